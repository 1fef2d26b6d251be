// The twins of hopper.cuh: the same names, computed by the layouts and rules its header states.

inline void mbarrier_init(u64* barrier, u32 arrivals) {
  emu::mbarrier_init(emu::shared_address(barrier), arrivals);
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(u64* barrier) {
  emu::mbarrier_arrive(emu::shared_address(barrier), 0);
}
inline void mbarrier_arrive_expect(u64* barrier, u32 bytes) {
  emu::mbarrier_arrive(emu::shared_address(barrier), bytes);
}
inline void mbarrier_wait(u64* barrier, u32 parity) {
  emu::mbarrier_wait(emu::shared_address(barrier), parity);
}

inline void tma_load_2d(void* shared, const TMap* map, int x, int y, u64* barrier) {
  emu::tensor_copy(emu::shared_address(shared), map, x, y, emu::shared_address(barrier));
}
inline void tma_prefetch_map(const TMap*) {}
inline void fence_proxy_async() {}

inline bool elect_one() {
  static const emu::Operation operation = {"elect.sync", [](void**, unsigned) {}};
  emu::collective(operation, nullptr);
  return emu::thread_number() % 32 == 0;
}

template <int REGISTERS>
inline void registers_release() {
  static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0, "a budget");
  static const emu::Operation operation = {"setmaxnreg.dec", [](void**, unsigned) {}};
  emu::collective(operation, nullptr);
}
template <int REGISTERS>
inline void registers_claim() {
  static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0, "a budget");
  static const emu::Operation operation = {"setmaxnreg.inc", [](void**, unsigned) {}};
  emu::collective(operation, nullptr);
}

inline u64 wgmma_descriptor(const void* shared, u32 leading_bytes, u32 stride_bytes) {
  return static_cast<u64>((emu::shared_address(shared) & 0x3ffffu) >> 4) |
         static_cast<u64>((leading_bytes & 0x3ffffu) >> 4) << 16 |
         static_cast<u64>((stride_bytes & 0x3ffffu) >> 4) << 32 | 1ull << 62;
}

inline void wgmma_fence() { emu::wgmma_fence(); }
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int COUNT>
inline void wgmma_hold(float (&)[COUNT]) {}
template <int PENDING, class... Accumulators>
inline void wgmma_wait(Accumulators&... d) {
  emu::wgmma_wait(PENDING);
  (emu::wgmma_check_ready(d), ...);
}

template <int N>
inline void wgmma_ss(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
  static_assert(N == 64 || N == 128, "the shapes of hopper.cuh");
  emu::wgmma_issue(d, N, nullptr, a, b, accumulate);
}
template <int N>
inline void wgmma_rs(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 256, "the shapes of hopper.cuh");
  emu::wgmma_issue(d, N, a, 0, b, accumulate);
}
