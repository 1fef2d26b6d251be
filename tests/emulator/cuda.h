// The CUDA language as a C++ compiler sees it: qualifiers, built-in variables, vector types and
// intrinsics. Included, inside an unnamed namespace, before the source of a kernel.
//
// Warp intrinsics meet in `emu::collective`; reading a lane outside the mask is an error here
// (undefined on a GPU). What is missing is missing on purpose: it does not compile.

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static __attribute__((section("skim_shared")))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __builtin_assume(condition)

#define threadIdx (*emu::thread_index)
#define blockIdx (emu::block_index)
#define blockDim (emu::block_size)
#define gridDim (emu::grid_size)
constexpr int warpSize = 32;

// ---- vector types, aligned as CUDA aligns them --------------------------------------------------

#define EMU_VECTORS(type, name, bytes)                                              \
  struct __attribute__((aligned(2 * bytes))) name##2 { type x, y; };                \
  struct name##3 { type x, y, z; };                                                 \
  struct __attribute__((aligned(4 * bytes > 16 ? 16 : 4 * bytes))) name##4 {        \
    type x, y, z, w;                                                                \
  };                                                                                \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                  \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }       \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTORS(signed char, char, 1)
EMU_VECTORS(unsigned char, uchar, 1)
EMU_VECTORS(short, short, 2)
EMU_VECTORS(unsigned short, ushort, 2)
EMU_VECTORS(int, int, 4)
EMU_VECTORS(unsigned, uint, 4)
EMU_VECTORS(float, float, 4)
EMU_VECTORS(long long, longlong, 8)
EMU_VECTORS(unsigned long long, ulonglong, 8)
EMU_VECTORS(double, double, 8)
#undef EMU_VECTORS

// ---- arithmetic ---------------------------------------------------------------------------------

#define EMU_MIN_MAX(type)                                         \
  inline type min(type a, type b) { return b < a ? b : a; }       \
  inline type max(type a, type b) { return a < b ? b : a; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
inline unsigned max(int a, unsigned b) { return max(static_cast<unsigned>(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }

template <class To, class From>
inline To emu_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}
inline unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emu_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
inline float __int_as_float(int x) { return emu_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emu_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emu_bits<double>(x); }

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(ceilf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<unsigned long long>(x) * y >> 32);
}
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; i++) result |= (x >> i & 1u) << (31 - i);
  return result;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned code = selector >> (4 * i) & 15u;
    const unsigned byte = static_cast<unsigned>(bytes >> (8 * (code & 7u))) & 255u;
    result |= (code & 8u ? (byte & 128u ? 255u : 0u) : byte) << (8 * i);
  }
  return result;
}

// ---- memory -------------------------------------------------------------------------------------

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcg(T* p, T value) { *p = value; }
template <class T> inline void __stcs(T* p, T value) { *p = value; }
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emu::fail("__trap"); }

#define EMU_ATOMIC(name, expression)                                          \
  inline int name(int* p, int value) {                                        \
    const int old = *p;                                                       \
    *p = expression;                                                          \
    return old;                                                               \
  }                                                                           \
  inline unsigned name(unsigned* p, unsigned value) {                         \
    const unsigned old = *p;                                                  \
    *p = expression;                                                          \
    return old;                                                               \
  }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicAnd, old & value)
EMU_ATOMIC(atomicXor, old ^ value)
EMU_ATOMIC(atomicMax, max(old, value))
EMU_ATOMIC(atomicMin, min(old, value))
EMU_ATOMIC(atomicExch, value)
#undef EMU_ATOMIC

// ---- block and warp -----------------------------------------------------------------------------

inline void __syncthreads() { emu::barrier("__syncthreads", 0, 0, true); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  static const emu::Operation operation = {"__syncwarp", [](void**, unsigned) {}};
  emu::collective(operation, nullptr, mask);
}

template <class T>
struct emu_exchange {
  T value, result;
  int source;  // lane
};

template <class T>
inline void emu_run_exchange(void** lanes, unsigned mask) {
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    auto* self = static_cast<emu_exchange<T>*>(lanes[__builtin_ctz(rest)]);
    if (!(mask >> self->source & 1u))
      emu::fail("a shuffle in lane %d reads lane %d, which is not in the mask 0x%x",
                __builtin_ctz(rest), self->source, mask);
    self->result = static_cast<emu_exchange<T>*>(lanes[self->source])->value;
  }
}

// As PTX shfl does: a source outside the lane's segment of `width` lanes means the lane itself.
template <class T>
inline T emu_shuffle(const emu::Operation& operation, unsigned mask, T value, int source,
                     int width) {
  const int lane = static_cast<int>(emu::thread_number() % 32), begin = lane / width * width;
  emu_exchange<T> exchange = {value, value, lane};
  if (source >= begin && source < begin + width) exchange.source = source;
  emu::collective(operation, &exchange, mask);
  return exchange.result;
}
#define EMU_SHUFFLE(name, second, expression)                                              \
  template <class T>                                                                       \
  inline T name(unsigned mask, T value, second, int width = 32) {                          \
    static const emu::Operation operation = {#name, emu_run_exchange<T>};                  \
    const int lane = static_cast<int>(emu::thread_number() % 32);                          \
    (void)lane;                                                                            \
    return emu_shuffle(operation, mask, value, expression, width);                         \
  }
EMU_SHUFFLE(__shfl_sync, int source, lane / width * width + (source & (width - 1)))
EMU_SHUFFLE(__shfl_xor_sync, int lanes, lane ^ lanes)
EMU_SHUFFLE(__shfl_up_sync, unsigned lanes, lane - static_cast<int>(lanes))
EMU_SHUFFLE(__shfl_down_sync, unsigned lanes, lane + static_cast<int>(lanes))
#undef EMU_SHUFFLE

struct emu_vote {
  unsigned value, result;
};
#define EMU_VOTE(name, type, start, combine, given, answer)                                \
  inline type name(unsigned mask, type value) {                                            \
    static const emu::Operation operation = {#name, [](void** lanes, unsigned all) {       \
      unsigned result = start;                                                             \
      for (unsigned rest = all; rest; rest &= rest - 1) {                                  \
        const int lane = __builtin_ctz(rest);                                              \
        const unsigned value = static_cast<emu_vote*>(lanes[lane])->value;                 \
        (void)lane;                                                                        \
        result = combine;                                                                  \
      }                                                                                    \
      for (unsigned rest = all; rest; rest &= rest - 1)                                    \
        static_cast<emu_vote*>(lanes[__builtin_ctz(rest)])->result = result;               \
    }};                                                                                    \
    emu_vote vote = {static_cast<unsigned>(given), 0};                                     \
    emu::collective(operation, &vote, mask);                                               \
    return static_cast<type>(vote.result);                                                 \
  }
EMU_VOTE(__any_sync, int, 0, result | value, value != 0, result)
EMU_VOTE(__all_sync, int, 1, result & value, value != 0, result)
EMU_VOTE(__reduce_add_sync, unsigned, 0, result + value, value, result)
EMU_VOTE(__reduce_or_sync, unsigned, 0, result | value, value, result)
EMU_VOTE(__reduce_min_sync, unsigned, ~0u, min(result, value), value, result)
EMU_VOTE(__reduce_max_sync, unsigned, 0, max(result, value), value, result)
#undef EMU_VOTE

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  static const emu::Operation operation = {"__ballot_sync", [](void** lanes, unsigned all) {
    unsigned result = 0;
    for (unsigned rest = all; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      if (static_cast<emu_vote*>(lanes[lane])->value) result |= 1u << lane;
    }
    for (unsigned rest = all; rest; rest &= rest - 1)
      static_cast<emu_vote*>(lanes[__builtin_ctz(rest)])->result = result;
  }};
  emu_vote vote = {predicate != 0, 0};
  emu::collective(operation, &vote, mask);
  return vote.result;
}
