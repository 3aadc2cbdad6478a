// Rows of FP8 (e4m3) as floats, and rows of floats as int8: what becomes of FP8 checkpoints on their way into weights.
//
// Both are a pass over a few hundred rows that stay in the caches (backend.py), spread over the threads. A table of all
// 256 floats is quicker than NumPy's conversion by ten times. Compiled once: each takes less time than packing.

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace vllm_ms {
namespace {

constexpr int kLanes = 16;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: after adding it a float of magnitude up to 2^22 is a whole number

struct Table {
  float values[256];
  Table() {
    for (int bits = 0; bits < 256; ++bits) {
      const int exponent = bits >> 3 & 15, mantissa = bits & 7;
      const float magnitude =
          exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
      values[bits] = bits & 128 ? -magnitude : magnitude;
    }
  }
};

// body(row) for every row, on several threads.
template <class Body>
void parallel(long rows, const Body& body) {
  run_chunks(
      rows, [](void* context, long row, int) { (*static_cast<const Body*>(context))(row); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

float largest_magnitude(const float* values, long count) {
  float most[kLanes] = {};
  long i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const float magnitude = std::fabs(values[i + lane]);
      most[lane] = magnitude > most[lane] ? magnitude : most[lane];
    }
  for (; i < count; ++i) most[0] = std::fmax(most[0], std::fabs(values[i]));
  for (float value : most) most[0] = std::fmax(most[0], value);
  return most[0];
}

}  // namespace

void widen_float8(const Float8Rows& rows, float* to) {
  static const Table table;
  parallel(rows.rows, [&](long row) {
    const uint8_t* from = rows.values + row * rows.stride;
    const float* scales = rows.scales + row * rows.scale_count;
    float* out = to + row * rows.columns;
    for (long k = 0; k < rows.columns;) {
      const long block = (rows.offset + k) / rows.width, last = (block + 1) * rows.width - rows.offset;
      const long end = last < rows.columns ? last : rows.columns;
      const float scale = scales[block];
      for (; k < end; ++k) out[k] = table.values[from[k]] * scale;
    }
  });
}

void round_rows(const float* values, long rows, long columns, int8_t* to, float* scales) {
  parallel(rows, [&](long row) {
    const float* from = values + row * columns;
    int8_t* out = to + row * columns;
    const float scale = scales[row] = largest_magnitude(from, columns) / 127.0f;
    const float divisor = scale > 0 ? scale : 1.0f;
    for (long i = 0; i < columns; ++i) {
      const float shifted = from[i] / divisor + kRound;
      int32_t bits;
      memcpy(&bits, &shifted, 4);
      out[i] = int8_t(bits);  // the low byte of a whole number from -127 to 127, in two's complement
    }
  });
}

}  // namespace vllm_ms
