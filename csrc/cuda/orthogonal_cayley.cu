// SPDX-License-Identifier: Apache-2.0
#include "cuda/orthogonal_cayley.cuh"

extern "C" int64_t rom_cayley_forward_workspace_cuda(const rom_cayley_forward_args* args) {
  return workspace<CayleyForward>(args->x);
}
extern "C" rom_status rom_cayley_forward_cuda(const rom_cayley_forward_args* args) {
  return run<CayleyForward>("cayley_forward", *args);
}

extern "C" int64_t rom_cayley_backward_workspace_cuda(const rom_cayley_backward_args* args) {
  return workspace<CayleyBackward>(args->x);
}
extern "C" rom_status rom_cayley_backward_cuda(const rom_cayley_backward_args* args) {
  return run<CayleyBackward>("cayley_backward", *args);
}
