# Finds nvcc: CMAKE_CUDA_COMPILER or CUDACXX, PATH, /usr/local/cuda, or the PyPI packages nvidia-cuda-nvcc and
# nvidia-cuda-runtime (with their nvidia-cuda-crt, nvidia-nvvm and nvidia-cuda-cccl) of the Python that runs the build.

function(sws_find_nvcc_of_python result)
  find_package(Python COMPONENTS Interpreter QUIET)
  if(NOT Python_EXECUTABLE)
    return()
  endif()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    OUTPUT_VARIABLE site OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  file(GLOB candidates "${site}/nvidia/cu[0-9]*/bin/nvcc" "${site}/nvidia/cuda_nvcc/bin/nvcc")
  if(candidates)
    list(GET candidates 0 nvcc)
    set(${result} "${nvcc}" PARENT_SCOPE)
  endif()
endfunction()

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(SWS_NVCC nvcc PATHS /usr/local/cuda/bin /opt/cuda/bin)
  if(NOT SWS_NVCC)
    sws_find_nvcc_of_python(nvcc_of_python)
    set(SWS_NVCC "${nvcc_of_python}")
  endif()
  if(NOT SWS_NVCC)
    message(FATAL_ERROR "The CUDA compiler nvcc was not found. Install a CUDA toolkit (12.8 or later), or "
                        "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-crt "
                        "nvidia-nvvm, or set CUDACXX.")
  endif()
  set(CMAKE_CUDA_COMPILER "${SWS_NVCC}" CACHE FILEPATH "CUDA compiler")
endif()
