// Number formats by the names the tests use.
#pragma once

#include <stdexcept>
#include <string>

#include "common/number_formats.h"

namespace sws {

inline NumberFormat format_of_name(const std::string& name) {
  if (name == "float32") return NumberFormat::kFloat32;
  if (name == "float16") return NumberFormat::kFloat16;
  if (name == "bfloat16") return NumberFormat::kBFloat16;
  throw std::runtime_error("unknown number format '" + name + "'");
}

// Calls work(element) with a value of the format's element type.
template <typename Work>
void with_element(NumberFormat format, Work work) {
  switch (format) {
    case NumberFormat::kFloat32:
      return work(0.0f);
    case NumberFormat::kFloat16:
      return work(Float16{});
    case NumberFormat::kBFloat16:
      return work(BFloat16{});
  }
}

}  // namespace sws
