// Arguments of the kernel of causal_halo: plain pointers and numbers, filled by bindings.cpp.
#pragma once

#include <cstdint>

namespace mcv {

constexpr int64_t kCopyBlock = 256 * 8 * 4;  // values of one row that one block takes

// Some frames of a clip [B, C, T, H, W], which per sample and channel lie in one piece, to or from a message.
struct FramesArgs {
  void* clip;            // first of the frames
  void* message;         // [rows, length], rows = B C, length = frames H W
  int64_t rows, length;
  int64_t stride;        // of the clip's rows: T H W
  int is_unpack;         // 0: clip -> message; 1: message is added to the clip
  int is_wide;           // all rows begin at multiples of 16 bytes
};

}  // namespace mcv

// Returns 0, or the code of the error (cudaError_t).
extern "C" int mcv_halo_frames_cuda(const mcv::FramesArgs* args, int dtype, void* stream);
