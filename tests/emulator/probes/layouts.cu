// One warp a kernel: what each intrinsic leaves in each lane, written out for NumPy to judge.
#include "ptx.cuh"

// rows: bf16 [32, 8]; out: u32 [32 lanes, 4].
template <bool TRANSPOSED>
__device__ void load(const bf16* rows, u32* out) {
  SKIM_SHARED(staged);
  bf16* const tile = reinterpret_cast<bf16*>(staged);
  for (int i = lane_index(); i < 256; i += WARP) tile[i] = rows[i];
  __syncwarp();
  u32 r[4];
  if (TRANSPOSED)
    ldmatrix_x4_trans(r, shared_address(tile + 8 * lane_index()));
  else
    ldmatrix_x4(r, shared_address(tile + 8 * lane_index()));
  for (int i = 0; i < 4; ++i) out[4 * lane_index() + i] = r[i];
}
extern "C" __global__ void load_straight(const bf16* rows, u32* out) { load<false>(rows, out); }
extern "C" __global__ void load_across(const bf16* rows, u32* out) { load<true>(rows, out); }

// a: u32 [32, 4]; b: u32 [32, 2]; c: float [32, 4], added to.
extern "C" __global__ void multiply(const u32* a, const u32* b, float* c) {
  const int lane = lane_index();
  const u32 own_a[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
  float own_c[4];
  for (int i = 0; i < 4; ++i) own_c[i] = c[4 * lane + i];
  mma_m16n8k16(own_c, own_a, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; ++i) c[4 * lane + i] = own_c[i];
}

// The recipes of ptx.cuh's header: S = Q K^T of q [16, 16] and k [16, 16], then out = bf16(S) V of
// v [16, 16], all operands by ldmatrix from row-major tiles; out float [16, 16].
extern "C" __global__ void attend(const bf16* q, const bf16* k, const bf16* v, float* out) {
  SKIM_SHARED(shared);
  bf16* const tiles = reinterpret_cast<bf16*>(shared);
  const int lane = lane_index();
  for (int i = lane; i < 256; i += WARP) {
    tiles[i] = q[i];
    tiles[256 + i] = k[i];
    tiles[512 + i] = v[i];
  }
  __syncwarp();
  u32 a[4], b[4];
  ldmatrix_x4(a, shared_address(tiles + lane % 16 * 16 + lane / 16 * 8));
  ldmatrix_x4(b, shared_address(tiles + 256 + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8));
  float left[4] = {}, right[4] = {};
  mma_m16n8k16(left, a, b[0], b[1]);
  mma_m16n8k16(right, a, b[2], b[3]);
  const u32 weights[4] = {pack_bf16x2(left[0], left[1]), pack_bf16x2(left[2], left[3]),
                          pack_bf16x2(right[0], right[1]), pack_bf16x2(right[2], right[3])};
  ldmatrix_x4_trans(b, shared_address(tiles + 512 + lane % 16 * 16 + lane / 16 * 8));
  for (int half = 0; half < 2; ++half) {
    float sums[4] = {};
    mma_m16n8k16(sums, weights, b[2 * half], b[2 * half + 1]);
    for (int i = 0; i < 4; ++i)
      out[(lane / 4 + i / 2 * 8) * 16 + 8 * half + lane % 4 * 2 + i % 2] = sums[i];
  }
}

// 16 bytes a lane through cp.async, the odd lanes as zero.
extern "C" __global__ void copy(const uint4* source, uint4* out) {
  SKIM_SHARED(shared);
  uint4* const slots = reinterpret_cast<uint4*>(shared);
  const int lane = lane_index();
  cp_async_16(shared_address(slots + lane), source + lane, lane % 2 == 0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  out[lane] = slots[WARP - 1 - lane];
}

// values: float [32]; out: float [32, 10].
extern "C" __global__ void exchange(const float* values, float* out) {
  const int lane = lane_index();
  const float own = values[lane];
  float* const row = out + 10 * lane;
  row[0] = __shfl_sync(FULL_WARP, own, 5);
  row[1] = __shfl_sync(FULL_WARP, own, lane + 1, 8);
  row[2] = __shfl_xor_sync(FULL_WARP, own, 3);
  row[3] = __shfl_up_sync(FULL_WARP, own, 2);
  row[4] = __shfl_down_sync(FULL_WARP, own, 2, 16);
  row[5] = warp_sum(own);
  row[6] = warp_max(own);
  row[7] = quad_sum(own);
  row[8] = quad_max(own);
  row[9] = lane < 16 ? __shfl_sync(0xffffu, own, 3) : __shfl_sync(0xffff0000u, own, 20);
}

// out: u32 [32, 5].
extern "C" __global__ void vote(const u32* values, u32* out) {
  const int lane = lane_index();
  u32* const row = out + 5 * lane;
  row[0] = __ballot_sync(FULL_WARP, values[lane] & 1);
  row[1] = __any_sync(FULL_WARP, values[lane] == 7);
  row[2] = __all_sync(FULL_WARP, values[lane] < 1000);
  row[3] = __reduce_add_sync(FULL_WARP, values[lane]);
  row[4] = __popc(row[0]) * 10000 + __ffs(values[lane]) * 100 + __clz(values[lane]);
}

// One thread a number: float_to_bf16, both halves of pack_bf16x2, half_to_float, exp2_approx.
extern "C" __global__ void convert(const float* values, const u16* halves, u32* bits, u32* pairs,
                                   float* wide, float* powers, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  bits[i] = float_to_bf16(values[i]);
  pairs[i] = pack_bf16x2(values[i], values[n - 1 - i]);
  wide[i] = half_to_float(halves[i]);
  powers[i] = exp2_approx(values[i]);
}
