// A float16 for run_plan.cpp, by the compiler's own.
#pragma once

struct __half {
  __half(float value = 0) : value(static_cast<_Float16>(value)) {}
  operator float() const { return static_cast<float>(value); }
  _Float16 value;
};
