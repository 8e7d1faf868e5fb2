// The frames of a halo into a message, and a message's gradient back onto its frames, for clips whose frames don't lie in
// one piece (NCDHW, or several samples). Least traffic: each value read once and written once; added, read twice.
#include "../common/launch.h"
#include "args.h"

namespace mcv {
namespace MCV_ISA {

constexpr int kCopyThreads = 256;

template <class S, int n>
__device__ __forceinline__ void move(S* clip, S* message, bool is_unpack) {
  if constexpr (n == 1) {
    if (is_unpack) *clip = Narrow<S>::of(widen(*clip) + widen(*message)); else *message = *clip;
  } else {
    Raw8<S> from, onto;
    from.load(is_unpack ? message : clip);
    if (is_unpack) {
      float x[kChunk], y[kChunk];
      onto.load(clip);
      from.unpack(x), onto.unpack(y);
      MCV_UNROLL for (int i = 0; i < kChunk; ++i) y[i] += x[i];
      from.pack(y);
    }
    from.store(is_unpack ? clip : message);
  }
}

template <class S, int n>
MCV_KERNEL(kCopyThreads, 4) halo_frames(MCV_ARGUMENT(FramesArgs) a) {
  const int64_t blocks = (a.length + kCopyBlock - 1) / kCopyBlock, row = blockIdx.x / blocks;
  const int64_t first = blockIdx.x % blocks * kCopyBlock, last = smaller<int64_t>(first + kCopyBlock, a.length);
  S* const clip = static_cast<S*>(a.clip) + row * a.stride;
  S* const message = static_cast<S*>(a.message) + row * a.length;
  for (int64_t at = first + int64_t(threadIdx.x) * n; at < last; at += kCopyThreads * n) {
    move<S, n>(clip + at, message + at, a.is_unpack);
  }
}

template <class S>
int launch_frames(const FramesArgs& a, void* stream) {
  const unsigned blocks = unsigned(a.rows * ((a.length + kCopyBlock - 1) / kCopyBlock));
  if (a.is_wide) return MCV_LAUNCH((halo_frames<S, kChunk>), blocks, kCopyThreads, stream, a);
  return MCV_LAUNCH((halo_frames<S, 1>), blocks, kCopyThreads, stream, a);
}

}  // namespace MCV_ISA
}  // namespace mcv

extern "C" int mcv_halo_frames_cuda(const mcv::FramesArgs* args, int dtype, void* stream) {
  using namespace mcv::MCV_ISA;
  if (dtype == mcv::kFloat32) return launch_frames<float>(*args, stream);
  if (dtype == mcv::kBFloat16) return launch_frames<bf16>(*args, stream);
  return launch_frames<fp16>(*args, stream);
}
