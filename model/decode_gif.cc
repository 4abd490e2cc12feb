#include <gif_lib.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "model/decoders.h"
#include "proto/base/status.h"

namespace pyramid {

// The first picture of the file on its canvas, whose rest has the transparent colour, or colour 0,
// as Pillow does.
absl::StatusOr<RgbImage> DecodeGif(absl::string_view bytes, const DecodeLimits& limits) {
  int error = 0;
  absl::string_view rest = bytes;
  GifFileType* gif = DGifOpen(
      &rest,
      [](GifFileType* file, GifByteType* out, int size) {
        auto& source = *static_cast<absl::string_view*>(file->UserData);
        const size_t count = std::min(source.size(), static_cast<size_t>(size));
        std::memcpy(out, source.data(), count);
        source.remove_prefix(count);
        return static_cast<int>(count);
      },
      &error);
  const auto broken = [&] {
    const char* text = GifErrorString(gif != nullptr ? gif->Error : error);
    return NotAPicture(absl::StrCat("broken GIF: ", text != nullptr ? text : "cut off"));
  };
  if (gif == nullptr) return broken();
  const absl::Cleanup closer = [&] { DGifCloseFile(gif, nullptr); };

  int transparent = 0;
  GifRecordType record = UNDEFINED_RECORD_TYPE;
  while (true) {
    if (DGifGetRecordType(gif, &record) == GIF_ERROR) return broken();
    if (record == IMAGE_DESC_RECORD_TYPE) break;
    if (record != EXTENSION_RECORD_TYPE) return NotAPicture("a GIF without a picture");
    int code = 0;
    GifByteType* block = nullptr;
    if (DGifGetExtension(gif, &code, &block) == GIF_ERROR) return broken();
    if (code == GRAPHICS_EXT_FUNC_CODE && block != nullptr && block[0] >= 4 &&
        (block[1] & 1) != 0) {
      transparent = block[4];
    }
    while (block != nullptr) {
      if (DGifGetExtensionNext(gif, &block) == GIF_ERROR) return broken();
    }
  }
  if (DGifGetImageDesc(gif) == GIF_ERROR) return broken();
  const GifImageDesc& frame = gif->Image;
  RETURN_IF_ERROR(CheckPictureSize(frame.Width, frame.Height, bytes.size(), limits));
  const ColorMapObject* colours = frame.ColorMap != nullptr ? frame.ColorMap : gif->SColorMap;
  if (colours == nullptr) return NotAPicture("a GIF without a colour table");

  std::array<std::array<uint8_t, 3>, 256> table{};
  for (int i = 0; i < std::min(colours->ColorCount, 256); ++i) {
    table[static_cast<size_t>(i)] = {colours->Colors[i].Red, colours->Colors[i].Green,
                                     colours->Colors[i].Blue};
  }
  RgbImage image = BlankImage(gif->SWidth, gif->SHeight, 3);
  const auto put = [&](int x, int y, int index) {
    if (x < 0 || y < 0 || x >= image.width || y >= image.height) return;
    const size_t at =
        (static_cast<size_t>(y) * static_cast<size_t>(image.width) + static_cast<size_t>(x)) * 3;
    std::memcpy(image.pixels.data() + at, table[static_cast<size_t>(index)].data(), 3);
  };
  for (int y = 0; y < image.height; ++y) {
    for (int x = 0; x < image.width; ++x) put(x, y, transparent);
  }
  struct Pass {
    int first, step;
  };
  const std::vector<Pass> passes = frame.Interlace
                                       ? std::vector<Pass>{{0, 8}, {4, 8}, {2, 4}, {1, 2}}
                                       : std::vector<Pass>{{0, 1}};
  std::vector<GifPixelType> line(static_cast<size_t>(frame.Width));
  for (const Pass& pass : passes) {
    for (int y = pass.first; y < frame.Height; y += pass.step) {
      if (DGifGetLine(gif, line.data(), frame.Width) == GIF_ERROR) return broken();
      for (int x = 0; x < frame.Width; ++x) {
        put(frame.Left + x, frame.Top + y, line[static_cast<size_t>(x)]);
      }
    }
  }
  return image;
}

}  // namespace pyramid
