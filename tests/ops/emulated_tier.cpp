// A tier file over emulated instructions, as a shared object for _C.add_cpu_isa.
#include "emulated_instructions.h"
#if defined(EMULATE_AMX)
#include "tiers/amx.cpp"
#else
#include "tiers/avx_vnni.cpp"
#endif

namespace {

llmrt::Tier renamed() {
#if defined(EMULATE_AMX)
  llmrt::Tier tier = llmrt::tier_amx;
  tier.name = "emulated_amx";
#else
  llmrt::Tier tier = llmrt::tier_avx_vnni;
  tier.name = "emulated_avx_vnni";
#endif
  return tier;
}
const llmrt::Tier tier = renamed();

}  // namespace

extern "C" __attribute__((visibility("default"))) const llmrt::Tier* llmrt_tier(size_t size) {
  return size == sizeof(llmrt::Tier) ? &tier : nullptr;
}
