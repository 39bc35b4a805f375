// The three number formats a tensor may have, stored as bits, and their conversion to and from float.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/platform.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace sws {

enum class NumberFormat { kFloat32, kFloat16, kBFloat16 };

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

SWS_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

SWS_HD float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

SWS_HD float to_float(float value) { return value; }

SWS_HD float to_float(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

SWS_HD float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1Fu;
  const uint32_t fraction = value.bits & 0x3FFu;
  if (exponent == 0x1Fu) return float_of_bits(sign | 0x7F800000u | (fraction << 13));
  if (exponent != 0) return float_of_bits(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
#endif
}

template <typename Element>
SWS_HD Element from_float(float value);

template <>
SWS_HD float from_float<float>(float value) {
  return value;
}

// Round to nearest, ties to even, as the hardware does.
template <>
SWS_HD BFloat16 from_float<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return BFloat16{0x7FFFu};
  return BFloat16{static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
SWS_HD Float16 from_float<Float16>(float value) {
#ifdef __CUDA_ARCH__
  return Float16{__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return Float16{static_cast<uint16_t>(sign | 0x7FFFu)};
  if (magnitude >= 0x477FF000u) return Float16{static_cast<uint16_t>(sign | 0x7C00u)};
  if (magnitude < 0x38800000u) {
    // Below the smallest normal number: adding 2^-1 aligns the last fraction bit at 2^-24, which rounds it.
    const float aligned = float_of_bits(magnitude) + 0.5f;
    return Float16{static_cast<uint16_t>(sign | (bits_of(aligned) - bits_of(0.5f)))};
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return Float16{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// Two 16-bit numbers in one register, the first one in the low half, as in tensor-core fragments.
template <typename Element>
SWS_HD uint32_t pack_pair(float low, float high) {
  return static_cast<uint32_t>(from_float<Element>(low).bits) |
         (static_cast<uint32_t>(from_float<Element>(high).bits) << 16);
}

}  // namespace sws
