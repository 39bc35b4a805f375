// The L1 diamond of a banded transport: the offset (dy, dx) of each entry, ordered by dy, then dx.
#pragma once

#include "common/platform.h"

namespace sws {

struct GridOffset {
  int dy;
  int dx;
};

// K(R) = 2 R^2 + 2 R + 1.
SWS_HD constexpr int offset_count(int radius) { return 2 * radius * (radius + 1) + 1; }

SWS_HD constexpr int absolute(int value) { return value < 0 ? -value : value; }

SWS_HD constexpr bool in_diamond(int radius, GridOffset offset) {
  return absolute(offset.dy) + absolute(offset.dx) <= radius;
}

// Rows dy = -R .. 0 hold 1, 3, 5, ... entries, so row dy starts at (dy + R)^2; the lower half mirrors the upper.
SWS_HD constexpr int offset_index(int radius, GridOffset offset) {
  const int sign = offset.dy > 0 ? -1 : 1;
  const int reach = radius - absolute(offset.dy);
  const int upper = reach * reach + reach + sign * offset.dx;
  return offset.dy > 0 ? offset_count(radius) - 1 - upper : upper;
}

}  // namespace sws
