// SPDX-License-Identifier: Apache-2.0
#include "cuda/orthogonal_householder.cuh"

extern "C" int64_t rom_householder_forward_workspace_cuda(const rom_householder_forward_args* args) {
  return workspace<HouseholderForward>(args->x);
}
extern "C" rom_status rom_householder_forward_cuda(const rom_householder_forward_args* args) {
  return run<HouseholderForward>("householder_forward", *args);
}

extern "C" int64_t rom_householder_backward_workspace_cuda(const rom_householder_backward_args* args) {
  return workspace<HouseholderBackward>(args->x);
}
extern "C" rom_status rom_householder_backward_cuda(const rom_householder_backward_args* args) {
  return run<HouseholderBackward>("householder_backward", *args);
}
