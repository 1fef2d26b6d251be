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

struct emu_ldmatrix {
  u32 address;
  u32* registers;
};

template <bool TRANSPOSED>
inline void emu_run_ldmatrix(void** lanes, unsigned) {
  u16 matrix[8][8];
  for (int i = 0; i < 4; i++) {
    for (int row = 0; row < 8; row++) {
      const u32 address = static_cast<emu_ldmatrix*>(lanes[8 * i + row])->address;
      memcpy(matrix[row], emu::shared_pointer(address, 16, 16, "ldmatrix"), 16);
    }
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4;
      const u32 low = TRANSPOSED ? matrix[2 * t][g] : matrix[g][2 * t];
      const u32 high = TRANSPOSED ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<emu_ldmatrix*>(lanes[lane])->registers[i] = high << 16 | low;
    }
  }
}

inline void ldmatrix_x4(u32 (&r)[4], u32 shared_row) {
  static const emu::Operation operation = {"ldmatrix.x4", emu_run_ldmatrix<false>};
  emu_ldmatrix load = {shared_row, r};
  emu::collective(operation, &load);
}
inline void ldmatrix_x4_trans(u32 (&r)[4], u32 shared_row) {
  static const emu::Operation operation = {"ldmatrix.x4.trans", emu_run_ldmatrix<true>};
  emu_ldmatrix load = {shared_row, r};
  emu::collective(operation, &load);
}

struct emu_mma {
  float* c;
  const u32* a;
  u32 b[2];
};

inline void mma_m16n8k16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  static const emu::Operation operation = {"mma.m16n8k16", [](void** lanes, unsigned) {
    float full_a[16][16], full_b[16][8], full_c[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const auto* mma = static_cast<emu_mma*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; i++) {
        const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
        full_a[row][column] = low_bf16(mma->a[i]);
        full_a[row][column + 1] = high_bf16(mma->a[i]);
        full_c[g + i / 2 * 8][2 * t + i % 2] = mma->c[i];
      }
      for (int i = 0; i < 2; i++) {
        full_b[2 * t + 8 * i][g] = low_bf16(mma->b[i]);
        full_b[2 * t + 8 * i + 1][g] = high_bf16(mma->b[i]);
      }
    }
    emu::multiply_16x8x16(full_c, full_a, full_b);
    for (int lane = 0; lane < 32; lane++) {
      float* const c = static_cast<emu_mma*>(lanes[lane])->c;
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; i++) c[i] = full_c[g + i / 2 * 8][2 * t + i % 2];
    }
  }};
  emu_mma mma = {c, a, {b0, b1}};
  emu::collective(operation, &mma);
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
