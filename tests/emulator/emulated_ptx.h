// The twins of ptx.cuh: the same names, computed by the layouts that its header states.

inline u32 shared_address(const void* pointer) { return emu::shared_address(pointer); }

inline void cp_async_16(u32 shared, const void* global, bool valid) {
  emu::copy_issue(shared, global, valid);
}
inline void cp_async_commit() { emu::copy_commit(); }
template <int PENDING>
inline void cp_async_wait() {
  emu::copy_wait(PENDING);
}

inline void ldmatrix_x4(u32 (&r)[4], u32 shared_row) { emu::load_matrices(r, shared_row, false); }
inline void ldmatrix_x4_trans(u32 (&r)[4], u32 shared_row) {
  emu::load_matrices(r, shared_row, true);
}

inline void mma_m16n8k16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emu::multiply_accumulate(c, a, b0, b1);
}

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return fabsf(y) < 1.17549435e-38f ? 0.0f : y;
}

inline u32 pack_bf16x2(float low, float high) {
  return static_cast<u32>(float_to_bf16(high)) << 16 | float_to_bf16(low);
}

inline float half_to_float(u16 bits) {
  const u32 sign = static_cast<u32>(bits & 0x8000u) << 16;
  const int exponent = bits >> 10 & 31;
  const u32 fraction = bits & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  const float size = exponent ? ldexpf(static_cast<float>(fraction | 0x400u), exponent - 25)
                              : ldexpf(static_cast<float>(fraction), -24);
  return __uint_as_float(sign | __float_as_uint(size));
}

inline void barrier_sync(int id, int threads) {
  emu::barrier("bar.sync", static_cast<unsigned>(id), static_cast<unsigned>(threads), true);
}
inline void barrier_arrive(int id, int threads) {
  emu::barrier("bar.arrive", static_cast<unsigned>(id), static_cast<unsigned>(threads), false);
}
