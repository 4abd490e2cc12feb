# The kernels of the CUDA plug-in, compiled by nvcc for every card since the A100, with their use of registers in cuda-resources.txt.
# CMake's own CUDA language would want a whole toolkit; this takes nvcc and the runtime's headers.
find_program(NVCC nvcc HINTS /usr/local/cuda/bin REQUIRED)
find_package(Python3 COMPONENTS Interpreter REQUIRED)
set(_architectures)
foreach(_architecture 80 90 100 120)
  list(APPEND _architectures -gencode arch=compute_${_architecture},code=sm_${_architecture})
endforeach()
# Later cards compile this when the plug-in is loaded.
list(APPEND _architectures -gencode arch=compute_120,code=compute_120)

set(CUDA_OBJECTS)
set(_resources)
foreach(_name attention attention_backward dwconv_gelu layer_norm sum_partials)
  set(_object ${CMAKE_CURRENT_BINARY_DIR}/cuda_${_name}.o)
  add_custom_command(
    OUTPUT ${_object} ${_object}.resources
    COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/compile ${_object}.resources ${NVCC} -ccbin ${CMAKE_CXX_COMPILER} -std=c++20 -O3
            ${_architectures} -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -I${PROJECT_SOURCE_DIR} --resource-usage -MD -MF ${_object}.d -c
            ${CMAKE_CURRENT_LIST_DIR}/${_name}.cu -o ${_object}
    DEPENDS ${CMAKE_CURRENT_LIST_DIR}/${_name}.cu ${CMAKE_CURRENT_LIST_DIR}/compile
    DEPFILE ${_object}.d
    COMMENT "nvcc ${_name}.cu")
  list(APPEND CUDA_OBJECTS ${_object})
  list(APPEND _resources ${_object}.resources)
endforeach()
set(CUDA_RESOURCES ${CMAKE_BINARY_DIR}/cuda-resources.txt)
add_custom_command(
  OUTPUT ${CUDA_RESOURCES}
  COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/compile --table ${CUDA_RESOURCES} ${_resources}
  DEPENDS ${_resources})
add_custom_target(cuda_kernels DEPENDS ${CUDA_OBJECTS} ${CUDA_RESOURCES})
