// Included after a kernel's source: how the runtime calls an entry, and its signature. The wrapper
// that build.py writes then has EMU_ENTRY for each entry.

template <class T> struct emu_kind { static constexpr char code = sizeof(T) == 128 ? 'T' : '?'; };
template <class T> struct emu_kind<T*> { static constexpr char code = 'p'; };
template <> struct emu_kind<int> { static constexpr char code = 'i'; };
template <> struct emu_kind<unsigned> { static constexpr char code = 'i'; };
template <> struct emu_kind<float> { static constexpr char code = 'f'; };
template <> struct emu_kind<long> { static constexpr char code = 'l'; };
template <> struct emu_kind<unsigned long> { static constexpr char code = 'l'; };
template <> struct emu_kind<long long> { static constexpr char code = 'l'; };
template <> struct emu_kind<unsigned long long> { static constexpr char code = 'l'; };

template <class T> struct emu_plain { typedef T type; };
template <class T> struct emu_plain<const T> { typedef T type; };

template <int...> struct emu_numbers {};
template <int N, int... REST> struct emu_count : emu_count<N - 1, N - 1, REST...> {};
template <int... REST> struct emu_count<0, REST...> { typedef emu_numbers<REST...> type; };

template <class T>
T emu_load(const void* argument) {  // arguments lie anywhere, a tensor map wants 64 bytes
  T value;
  memcpy(&value, argument, sizeof value);
  return value;
}

template <class... A>
struct emu_entry {
  static const char* signature() {
    static const char codes[] = {emu_kind<typename emu_plain<A>::type>::code..., 0};
    return codes;
  }
  template <int... I>
  static void call(void (*kernel)(A...), void** arguments, emu_numbers<I...>) {
    kernel(emu_load<typename emu_plain<A>::type>(arguments[I])...);
  }
};

template <class... A>
const char* emu_signature_of(void (*)(A...)) {
  return emu_entry<A...>::signature();
}
template <class... A>
void emu_call_with(void (*kernel)(A...), void** arguments) {
  (void)arguments;
  emu_entry<A...>::call(kernel, arguments, typename emu_count<sizeof...(A)>::type());
}

}  // namespace (opened by the wrapper)

extern "C" {
extern unsigned char __start_skim_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_skim_shared[] __attribute__((weak, visibility("hidden")));
unsigned char* emu_static_begin() { return __start_skim_shared; }
unsigned char* emu_static_end() { return __stop_skim_shared; }
}

#define EMU_ENTRY(entry)                                                                           \
  extern "C" const char* emu_signature_##entry() { return emu_signature_of(&entry); }              \
  extern "C" void emu_call_##entry(void** arguments) { emu_call_with(&entry, arguments); }
