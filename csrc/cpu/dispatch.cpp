// Picks, once, the widest instruction set that this build has and this CPU offers.
#include "../ccu_fast.h"

#define CCU_DECLARE(isa, op)      \
  namespace ccu {                 \
  namespace isa {                 \
  int op(const ccu_##op##_args&); \
  }                               \
  }

#if CCU_HAVE_AVX512
#define CCU_ON_AVX512(action) action
#else
#define CCU_ON_AVX512(action)
#endif
#if CCU_HAVE_AVX2
#define CCU_ON_AVX2(action) action
#else
#define CCU_ON_AVX2(action)
#endif
#if CCU_HAVE_NEON
#define CCU_ON_NEON(action) action
#else
#define CCU_ON_NEON(action)
#endif
#if CCU_HAVE_BASE
#define CCU_ON_BASE(action) action
#else
#define CCU_ON_BASE(action)
#endif

namespace {

enum class Isa { kBase, kNeon, kAvx2, kAvx512 };

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if CCU_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::kAvx512;
#endif
#if CCU_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
#endif
#if CCU_HAVE_NEON
  return Isa::kNeon;
#else
  return Isa::kBase;
#endif
}

Isa isa() {
  static const Isa found = detect();
  return found;
}

}  // namespace

const char* ccu_cpu_isa(void) {
  switch (isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kNeon:
      return "neon";
    default:
      return "base";
  }
}

#define CCU_OP(op)                                                      \
  CCU_ON_AVX512(CCU_DECLARE(avx512, op))                                \
  CCU_ON_AVX2(CCU_DECLARE(avx2, op))                                    \
  CCU_ON_NEON(CCU_DECLARE(neon, op))                                    \
  CCU_ON_BASE(CCU_DECLARE(base, op))                                    \
  int ccu_##op(const ccu_##op##_args* args) {                           \
    if (args == nullptr) return CCU_BAD_ARGUMENT;                       \
    switch (isa()) {                                                    \
      CCU_ON_AVX512(case Isa::kAvx512 : return ccu::avx512::op(*args);) \
      CCU_ON_AVX2(case Isa::kAvx2 : return ccu::avx2::op(*args);)       \
      CCU_ON_NEON(case Isa::kNeon : return ccu::neon::op(*args);)       \
      CCU_ON_BASE(case Isa::kBase : return ccu::base::op(*args);)       \
      default:                                                          \
        return CCU_UNSUPPORTED;                                         \
    }                                                                   \
  }

CCU_OP(similarity_forward)
CCU_OP(similarity_backward)
CCU_OP(similarity_softmax)
CCU_OP(small_info_nce)
CCU_OP(small_info_nce_backward)
CCU_OP(topk_flips)
CCU_OP(pgd_step)
CCU_OP(noise_add)
CCU_OP(noise_update)
CCU_OP(candidate_rest)
CCU_OP(candidate_losses)
CCU_OP(l2_normalize)
CCU_OP(l2_normalize_backward)
