// From row-major packed planes (formats.py) to tiles (format.h).

#include <cstdint>
#include <cstring>

#include "format.h"

namespace realm {
namespace {

// One plane's 32 codes of a row to the row's four bytes of each of `bits` vectors.
void place(const uint8_t* source, int bits, uint8_t* out) {
  if (bits == 8) {
    for (int q = 0; q < 8; ++q) memcpy(out + 64 * q, source + 4 * q, 4);
    return;
  }
  if (bits == 4) {  // column e and column e + 16 share a byte
    uint64_t low, high;
    memcpy(&low, source, 8);
    memcpy(&high, source + 8, 8);
    for (int i = 0; i < 4; ++i) {
      uint32_t a = low >> (16 * i) & 0xFFFF, b = high >> (16 * i) & 0xFFFF;
      auto spread = [](uint32_t v) {  // four nibbles to the low halves of four bytes
        v = (v | v << 8) & 0x00FF00FF;
        return (v | v << 4) & 0x0F0F0F0F;
      };
      uint32_t four = spread(a) | spread(b) << 4;
      memcpy(out + 64 * i, &four, 4);
    }
    return;
  }
  uint8_t code[kGroup];
  for (int e = 0; e < kGroup; ++e) code[e] = source[e * bits / 8] >> (e * bits % 8) & ((1 << bits) - 1);
  for (int i = 0; i < bits; ++i) {
    for (int j = 0; j < 4; ++j) {
      int byte = 0;
      for (int s = 0; s < 8 / bits; ++s) byte |= code[4 * (i + bits * s) + j] << (s * bits);
      out[64 * i + j] = static_cast<uint8_t>(byte);
    }
  }
}

struct Planes {
  const uint8_t *codes, *high, *scales, *mins, *super, *super_mins;  // row-major, of n rows
};

// One row of one block.
void tile_row(const Format& f, const Planes& in, int64_t row, int64_t block, int64_t blocks, int r, uint8_t* out) {
  const int groups = f.groups();
  auto at = [&](const uint8_t* plane, int64_t bytes) { return plane + (row * blocks + block) * bytes; };  // bytes per block
  if (f.super) {
    memcpy(out + 2 * r, at(in.super, 2), 2);
    if (f.mins) memcpy(out + 32 + 2 * r, at(in.super_mins, 2), 2);
    out += f.super_bytes();
  }
  auto nibble = [](const uint8_t* p, int g) { return p[g / 2] >> (4 * (g % 2)) & 15; };
  for (int g = 0; g < groups; ++g) {
    switch (f.scale) {
      case Scale::F16:
        memcpy(out + 32 * g + 2 * r, at(in.scales, 2 * groups) + 2 * g, 2);
        if (f.mins) memcpy(out + 32 * (groups + g) + 2 * r, at(in.mins, 2 * groups) + 2 * g, 2);
        break;
      case Scale::F32:
        memcpy(out + 64 * g + 4 * r, at(in.scales, 4 * groups) + 4 * g, 4);
        break;
      case Scale::K6: {
        if (g % 2) break;
        const uint8_t *s = at(in.scales, groups) + g, *m = at(in.mins, groups) + g;
        uint8_t* pair = out + 48 * (g / 2) + r;
        pair[0] = (s[0] & 63) | (m[1] & 3) << 6;
        pair[16] = (m[0] & 63) | (m[1] >> 2 & 3) << 6;
        pair[32] = (s[1] & 63) | (m[1] >> 4 & 3) << 6;
        break;
      }
      case Scale::K4:
        out[16 * g + r] = nibble(at(in.scales, groups / 2), g) | nibble(at(in.mins, groups / 2), g) << 4;
        break;
      case Scale::U4:
        if (g % 2 == 0) out[16 * (g / 2) + r] = at(in.scales, groups / 2)[g / 2];
        break;
      default:
        out[16 * g + r] = at(in.scales, groups)[g];
    }
  }
  out += f.scale_bytes();
  for (int part = 0; part < f.block / kGroup; ++part, out += f.code_bytes()) {
    place(at(in.codes, f.block * f.bits[0] / 8) + part * 4 * f.bits[0], f.bits[0], out + 4 * r);
    if (f.bits[1]) place(at(in.high, f.block * f.bits[1] / 8) + part * 4 * f.bits[1], f.bits[1], out + 64 * f.bits[0] + 4 * r);
  }
}

}  // namespace
}  // namespace realm

extern "C" {

__attribute__((visibility("default"))) const char* realm_quant_format_name(int32_t number) {
  static const char* const names[] = {
#define X(NAME, ...) #NAME,
      REALM_FORMATS(X)
#undef X
  };
  return number >= 0 && number < realm::kNumFormats ? names[number] : nullptr;
}

// Bytes of a tile of a weight with k columns.
__attribute__((visibility("default"))) int64_t realm_quant_tile_bytes(int32_t format, int64_t k) {
  const realm::Format& f = *realm::kFormats[format];
  return k / f.block * f.bytes();
}

// Rows 0..n-1 of row-major planes to ceil(n/16) tiles; rows that fill up the last tile become zeros.
__attribute__((visibility("default"))) void realm_quant_tile(
    int32_t format, int64_t n, int64_t k, const uint8_t* codes, const uint8_t* high, const uint8_t* scales,
    const uint8_t* mins, const uint8_t* super, const uint8_t* super_mins, uint8_t* out) {
  const realm::Format& f = *realm::kFormats[format];
  const realm::Planes planes{codes, high, scales, mins, super, super_mins};
  const int64_t blocks = k / f.block;
  for (int64_t first = 0; first < n; first += realm::kRows) {
    const int rows = n - first < realm::kRows ? static_cast<int>(n - first) : realm::kRows;
    if (rows < realm::kRows) memset(out, 0, blocks * f.bytes());
    for (int64_t b = 0; b < blocks; ++b, out += f.bytes()) {
      for (int r = 0; r < rows; ++r) realm::tile_row(f, planes, first + r, b, blocks, r, out);
    }
  }
}

}  // extern "C"
