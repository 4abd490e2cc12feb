#include "server/security/public_text.h"

#include <gtest/gtest.h>

namespace pyramid {
namespace {

TEST(HidePathsTest, OnlyTheLastPartIsLeft) {
  EXPECT_EQ(HidePaths("OpenCV: /build/opencv/modules/imgcodecs/src/loadsave.cpp:816: error: x"),
            "OpenCV: .../loadsave.cpp:816: error: x");
  EXPECT_EQ(HidePaths("can't open \"/home/me/a.jpg\"; see (/etc/x/y)."),
            "can't open \".../a.jpg\"; see (.../y).");
  EXPECT_EQ(HidePaths("error:/usr/lib/libtorch.so: no"), "error:.../libtorch.so: no");
  EXPECT_EQ(HidePaths("path=/var/lib/x, /a/b/."), "path=.../x, .../.");
  EXPECT_EQ(HidePaths("in /tmp."), "in .../tmp.");
}

TEST(HidePathsTest, OtherSlashesStay) {
  for (const char* text : {"12 images/s", "and/or", "https://example.org/a/b", "3/4", "a / b",
                           "<data>/models/bars/3", "1..4096", ""}) {
    EXPECT_EQ(HidePaths(text), text);
  }
}

TEST(HideAddressesTest, HostsPortsAndPointersGo) {
  EXPECT_EQ(HideAddresses("peer ipv4:10.0.0.7:4431 left"), "peer ipv4:<address> left");
  EXPECT_EQ(HideAddresses("bind 0.0.0.0"), "bind <address>");
  EXPECT_EQ(HideAddresses("at [::1]:8001, localhost:8001"), "at <address>, <address>");
  EXPECT_EQ(HideAddresses("freed 0x7f3a9c001200 twice"), "freed <address> twice");
}

TEST(HideAddressesTest, OtherNumbersStay) {
  for (const char* text : {"pictures[0] is 3x224x224", "version 1.2.3", "0x1F", "1.2.3.4.5",
                           "300.1.2.3", "[1, 2]", "[a:b]", "10:30:00", "float 0.5"}) {
    EXPECT_EQ(HideAddresses(text), text);
  }
}

TEST(PublicTextTest, TheDataFolderHasAName) {
  const PublicText text("/srv/pyramid/data");
  EXPECT_EQ(text.ForPictures("/srv/pyramid/data/models/bars/3/weights.safetensors is damaged"),
            "<data>/models/bars/3/weights.safetensors is damaged");
  EXPECT_EQ(text.ForPictures("/srv/pyramid/database/x"), ".../x") << "another folder";
  EXPECT_EQ(text.ForJobs("no checkpoint in /srv/pyramid/data"), "no checkpoint in <data>");
}

TEST(PublicTextTest, WhoTrainsReadsThePathsOfTheRecipe) {
  const PublicText text("/srv/pyramid/data");
  EXPECT_EQ(text.ForJobs("recipe.data_dir /mnt/pictures isn't there"),
            "recipe.data_dir /mnt/pictures isn't there");
  EXPECT_EQ(text.ForJobs("10.1.2.3:29500 refused"), "<address> refused");
}

}  // namespace
}  // namespace pyramid
