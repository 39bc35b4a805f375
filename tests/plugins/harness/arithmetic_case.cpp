#include "arithmetic_case.h"

#include <cstdint>

#include "banded_transport/offsets.h"
#include "common/number_formats.h"

namespace sws {
namespace {

void write_conversions(const Case& test) {
  const std::vector<unsigned char> bytes = test.read("x");
  const auto* values = reinterpret_cast<const float*>(bytes.data());
  const size_t count = bytes.size() / sizeof(float);
  std::vector<uint16_t> half(count);
  std::vector<uint16_t> brain(count);
  for (size_t i = 0; i < count; ++i) {
    half[i] = from_float<Float16>(values[i]).bits;
    brain[i] = from_float<BFloat16>(values[i]).bits;
  }
  test.write("float16", half.data(), count * sizeof(uint16_t));
  test.write("bfloat16", brain.data(), count * sizeof(uint16_t));
}

void write_widenings(const Case& test) {
  std::vector<float> half(65536);
  std::vector<float> brain(65536);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    half[bits] = to_float(Float16{static_cast<uint16_t>(bits)});
    brain[bits] = to_float(BFloat16{static_cast<uint16_t>(bits)});
  }
  test.write("from_float16", half.data(), half.size() * sizeof(float));
  test.write("from_bfloat16", brain.data(), brain.size() * sizeof(float));
}

// Rows (radius, dy, dx, index of (dy, dx)) for every entry of every radius.
void write_offsets(const Case& test) {
  std::vector<int32_t> rows;
  for (int radius = 1; radius <= 8; ++radius) {
    for (int dy = -radius; dy <= radius; ++dy) {
      for (int dx = absolute(dy) - radius; dx <= radius - absolute(dy); ++dx) {
        rows.insert(rows.end(), {radius, dy, dx, offset_index(radius, GridOffset{dy, dx})});
      }
    }
  }
  test.write("offsets", rows.data(), rows.size() * sizeof(int32_t));
}

}  // namespace

void run_arithmetic_case(const Case& test) {
  write_conversions(test);
  write_widenings(test);
  write_offsets(test);
}

}  // namespace sws
