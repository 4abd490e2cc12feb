// PNG files of any size, depth and kind, written by hand: blank ones, bombs, odd chunks.
#ifndef PYRAMID_TESTS_TESTING_PNG_H_
#define PYRAMID_TESTS_TESTING_PNG_H_

#include <gtest/gtest.h>
#include <zlib.h>

#include <cstdint>
#include <string>

namespace pyramid::testing {

inline std::string Big(uint32_t value) {
  std::string text;
  for (int shift = 24; shift >= 0; shift -= 8) text += static_cast<char>(value >> shift & 0xff);
  return text;
}

// A chunk of a PNG.
inline std::string Chunk(const std::string& kind, const std::string& data) {
  const std::string summed = kind + data;
  const auto* bytes = reinterpret_cast<const Bytef*>(summed.data());
  return Big(static_cast<uint32_t>(data.size())) + summed +
         Big(static_cast<uint32_t>(crc32(0, bytes, static_cast<uInt>(summed.size()))));
}

inline std::string Packed(const std::string& data) {
  uLongf size = compressBound(data.size());
  std::string packed(size, '\0');
  EXPECT_EQ(compress2(reinterpret_cast<Bytef*>(packed.data()), &size,
                      reinterpret_cast<const Bytef*>(data.data()), data.size(), 9),
            Z_OK);
  packed.resize(size);
  return packed;
}

// A PNG whose rows, each with its filter byte, are `rows`; `kind` is 0 for grey, 2 RGB, 6 RGBA.
inline std::string Png(int width, int height, int bits, int kind, const std::string& rows,
                       bool interlaced = false, const std::string& more_chunks = "") {
  std::string header = Big(static_cast<uint32_t>(width)) + Big(static_cast<uint32_t>(height));
  for (const int field : {bits, kind, 0, 0, interlaced ? 1 : 0}) header += static_cast<char>(field);
  return "\x89PNG\r\n\x1a\n" + Chunk("IHDR", header) + more_chunks + Chunk("IDAT", Packed(rows)) +
         Chunk("IEND", "");
}

// A PNG of zeros.
inline std::string BlankPng(int width, int height, int bits, int kind, int samples) {
  const size_t row = 1 + (static_cast<size_t>(width) * static_cast<size_t>(bits * samples) + 7) / 8;
  return Png(width, height, bits, kind, std::string(row * static_cast<size_t>(height), '\0'));
}

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_PNG_H_
