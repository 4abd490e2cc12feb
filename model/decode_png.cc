// PNG by libpng, because OpenCV lets it write each broken file's fault to standard error.
#include <png.h>
#include <setjmp.h>

#include <cstdio>
#include <cstring>
#include <memory>

#include "absl/strings/str_cat.h"
#include "model/decoders.h"

namespace pyramid {
namespace {

// libpng behind calls that return false instead of leaping; no object with a destructor lives
// between a setjmp and its longjmp. Gives grey or RGB of 8 bits.
class PngDecoder {
 public:
  explicit PngDecoder(absl::string_view bytes) : rest_(bytes) {
    png_ = png_create_read_struct(
        PNG_LIBPNG_VER_STRING, this,
        [](png_structp png, png_const_charp message) {
          auto* self = static_cast<PngDecoder*>(png_get_error_ptr(png));
          std::snprintf(self->message_, sizeof(self->message_), "%s", message);
          png_longjmp(png, 1);
        },
        [](png_structp, png_const_charp) {});
    if (png_ == nullptr) return;
    info_ = png_create_info_struct(png_);
    png_set_read_fn(png_, this, [](png_structp png, png_bytep out, size_t size) {
      auto* self = static_cast<PngDecoder*>(png_get_io_ptr(png));
      if (size > self->rest_.size()) png_error(png, "the file is cut off");
      std::memcpy(out, self->rest_.data(), size);
      self->rest_.remove_prefix(size);
    });
  }
  ~PngDecoder() { png_destroy_read_struct(&png_, &info_, nullptr); }
  PngDecoder(const PngDecoder&) = delete;
  PngDecoder& operator=(const PngDecoder&) = delete;

  // Up to the first row.
  bool Start() {
    if (png_ == nullptr || info_ == nullptr || setjmp(png_jmpbuf(png_)) != 0) return false;
    // Profiles and texts are packed, and may unpack to any size; none of them is wanted.
    png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_NEVER, nullptr, -1);
    png_read_info(png_, info_);
    const int colours = png_get_color_type(png_, info_);
    if (colours == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png_);
    if (colours == PNG_COLOR_TYPE_GRAY) png_set_expand_gray_1_2_4_to_8(png_);
    png_set_scale_16(png_);  // ÷ 257, rounded
    png_set_strip_alpha(png_);
    passes_ = png_set_interlace_handling(png_);
    png_read_update_info(png_, info_);
    return true;
  }
  // All rows of the picture; interlaced files come in several passes over them.
  bool Read(uint8_t* pixels, size_t stride) {
    if (setjmp(png_jmpbuf(png_)) != 0) return false;
    const png_uint_32 rows = png_get_image_height(png_, info_);
    for (int pass = 0; pass < passes_; ++pass) {
      for (png_uint_32 y = 0; y < rows; ++y) png_read_row(png_, pixels + y * stride, nullptr);
    }
    png_read_end(png_, nullptr);
    return true;
  }
  int channels() const { return png_get_channels(png_, info_); }
  size_t stride() const { return png_get_rowbytes(png_, info_); }
  const char* message() const { return message_; }

 private:
  absl::string_view rest_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
  int passes_ = 1;
  char message_[128] = "";
};

}  // namespace

absl::StatusOr<RgbImage> DecodePng(absl::string_view bytes, const PictureHeader& header) {
  auto decoder = std::make_unique<PngDecoder>(bytes);
  const auto broken = [&] { return NotAPicture(absl::StrCat("broken PNG: ", decoder->message())); };
  if (!decoder->Start()) return broken();
  RgbImage image = BlankImage(static_cast<int>(header.width), static_cast<int>(header.height),
                              decoder->channels());
  const size_t row = static_cast<size_t>(image.width) * static_cast<size_t>(image.channels);
  if ((image.channels != 1 && image.channels != 3) || decoder->stride() != row) {
    return NotAPicture("a PNG whose rows don't have its header's width");
  }
  if (!decoder->Read(image.pixels.data(), row)) return broken();
  return image;
}

}  // namespace pyramid
