# LibTorch as imported targets, without its own CMake package: that one asks for a CUDA toolkit, and its include folder carries old
# protobuf headers that would shadow the system's.
#
#   torch_cpu   libtorch_cpu and libc10; what every CPU program links
#
# LIBTORCH_DIR (variable or environment) names a folder with lib/ and include/: deploy/libtorch makes one in the cache folder, a Python
# torch 2.11 folder serves as well.
if(NOT LIBTORCH_DIR)
  if(DEFINED ENV{LIBTORCH_DIR})
    set(LIBTORCH_DIR $ENV{LIBTORCH_DIR})
  elseif(DEFINED ENV{PYRAMID_CACHE})
    set(LIBTORCH_DIR $ENV{PYRAMID_CACHE}/libtorch-2.11.0)
  elseif(DEFINED ENV{XDG_CACHE_HOME})
    set(LIBTORCH_DIR $ENV{XDG_CACHE_HOME}/pyramid/libtorch-2.11.0)
  else()
    set(LIBTORCH_DIR $ENV{HOME}/.cache/pyramid/libtorch-2.11.0)
  endif()
endif()
set(LIBTORCH_DIR ${LIBTORCH_DIR} CACHE PATH "Folder with LibTorch 2.11's lib/ and include/")
if(NOT EXISTS ${LIBTORCH_DIR}/lib/libtorch_cpu.so)
  message(FATAL_ERROR "No LibTorch in ${LIBTORCH_DIR}. Run ./deploy/libtorch, or set LIBTORCH_DIR to a folder with lib/ and include/.")
endif()
file(READ ${LIBTORCH_DIR}/include/torch/headeronly/version.h _torch_version)
if(NOT _torch_version MATCHES "TORCH_VERSION_MAJOR 2\n" OR NOT _torch_version MATCHES "TORCH_VERSION_MINOR 11\n")
  message(FATAL_ERROR "${LIBTORCH_DIR} is not LibTorch 2.11; the data-parallel reducer's constructor differs between versions.")
endif()

set(_torch_include ${LIBTORCH_DIR}/include)
if(EXISTS ${_torch_include}/google)
  # A Python torch folder: mirror its include folder without the protobuf headers.
  set(_torch_include ${CMAKE_BINARY_DIR}/libtorch-include)
  file(MAKE_DIRECTORY ${_torch_include})
  file(GLOB _entries RELATIVE ${LIBTORCH_DIR}/include ${LIBTORCH_DIR}/include/*)
  foreach(_entry ${_entries})
    if(NOT _entry STREQUAL "google" AND NOT EXISTS ${_torch_include}/${_entry})
      file(CREATE_LINK ${LIBTORCH_DIR}/include/${_entry} ${_torch_include}/${_entry} SYMBOLIC)
    endif()
  endforeach()
endif()

add_library(torch_c10 SHARED IMPORTED)
set_target_properties(torch_c10 PROPERTIES IMPORTED_LOCATION ${LIBTORCH_DIR}/lib/libc10.so)
add_library(torch_cpu SHARED IMPORTED)
set_target_properties(torch_cpu PROPERTIES IMPORTED_LOCATION ${LIBTORCH_DIR}/lib/libtorch_cpu.so)
target_include_directories(torch_cpu SYSTEM INTERFACE ${_torch_include} ${_torch_include}/torch/csrc/api/include)
target_compile_definitions(torch_cpu INTERFACE USE_DISTRIBUTED USE_C10D_GLOO)
target_link_libraries(torch_cpu INTERFACE torch_c10 Threads::Threads)
# libtorch_cpu of the CUDA build needs libcudart and libcupti beside it (deploy/libtorch puts them there) or from a CUDA 13 toolkit.
target_link_options(torch_cpu INTERFACE
  -Wl,-rpath,${LIBTORCH_DIR}/lib -Wl,-rpath-link,${LIBTORCH_DIR}/lib
  -Wl,-rpath,/usr/local/cuda/lib64 -Wl,-rpath-link,/usr/local/cuda/lib64
  -Wl,-rpath,/usr/local/cuda/extras/CUPTI/lib64 -Wl,-rpath-link,/usr/local/cuda/extras/CUPTI/lib64
  -Wl,--disable-new-dtags)
