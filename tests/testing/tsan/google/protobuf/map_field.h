// Under TSan protobuf's maps get two more members, which Debian's library, compiled without it,
// doesn't know: reading a map by reflection would read another member. This keeps the library's
// layout; builds with TSan alone look here first.
#pragma push_macro("__SANITIZE_THREAD__")
#undef __SANITIZE_THREAD__
#include_next <google/protobuf/map_field.h>
#pragma pop_macro("__SANITIZE_THREAD__")
