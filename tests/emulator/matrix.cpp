// Small matrix products of the emulator, with the same order of sums on every machine.
#include "runtime.h"

namespace emu {

#ifdef __x86_64__
__attribute__((target_clones("avx2", "default")))
#endif
void multiply_16x8x16(float c[16][8], const float a[16][16], const float b[16][8]) {
  for (int i = 0; i < 16; i++) {
    float row[8];
    for (int j = 0; j < 8; j++) row[j] = c[i][j];
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) row[j] += a[i][k] * b[k][j];
    for (int j = 0; j < 8; j++) c[i][j] = row[j];
  }
}

}  // namespace emu
