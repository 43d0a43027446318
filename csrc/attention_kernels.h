// The attention kernels of a tier.
#pragma once
#include "attention_decode_kernels.h"
#include "attention_prefill_kernels.h"

namespace llmrt {
namespace {

constexpr AttentionKernels attention_kernels = {most_decode_rows, decode_scratch, decode,       prefill_scratch,
                                                prefill,          state_floats,   merge_states, rows_in_range,
                                                mask_range,       store_row};

}  // namespace
}  // namespace llmrt
