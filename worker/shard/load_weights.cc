#include "worker/shard/load_weights.h"

#include <ATen/core/Tensor.h>

#include "common/status_macros.h"

namespace simpo {

absl::Status LoadWeights(const ModelWeightsReader& reader, ShardedParams& params) {
  for (Bucket& bucket : params.buckets()) {
    for (const ParamSlot& slot : bucket.slots) {
      SIMPO_ASSIGN_OR_RETURN(const at::Tensor whole, reader.Get(slot.spec.name, slot.spec.shape));
      params.SetWeight(bucket, slot, whole);
      reader.Drop(slot.spec.name);
    }
  }
  return absl::OkStatus();
}

}  // namespace simpo
