# Finds NvInferRuntime.h: SWS_TENSORRT_INCLUDE_DIR, an installed SDK, or the wheel `kernel-lens` from PyPI, which carries
# NVIDIA's TensorRT headers and is fetched into the build folder (235 KB) unless SWS_FETCH_TENSORRT_HEADERS is off.
# Sets SWS_TENSORRT_INCLUDE_DIR.

set(KERNEL_LENS_VERSION 2.0.1)
set(KERNEL_LENS_SHA256 07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0)

function(sws_fetch_tensorrt_headers result)
  find_package(Python COMPONENTS Interpreter QUIET)
  if(NOT Python_EXECUTABLE)
    set(SWS_FETCH_FAILURE " No Python was found to download them." PARENT_SCOPE)
    return()
  endif()
  set(folder "${CMAKE_BINARY_DIR}/tensorrt-headers")
  set(wheel "${folder}/kernel_lens-${KERNEL_LENS_VERSION}-py3-none-any.whl")
  if(NOT EXISTS "${wheel}")
    message(STATUS "Fetching the TensorRT headers (kernel-lens ${KERNEL_LENS_VERSION}) from PyPI")
    # -I: if pip runs this build, it sets PYTHONPATH, which would hide the installed pip.
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -I -m pip download --quiet --no-deps --no-input --disable-pip-version-check
              "kernel-lens==${KERNEL_LENS_VERSION}" --dest "${folder}"
      RESULT_VARIABLE failed ERROR_VARIABLE log)
    if(failed OR NOT EXISTS "${wheel}")
      string(REGEX REPLACE "[ \n]+" " " log "${log}")
      set(SWS_FETCH_FAILURE " The download from PyPI failed: ${log}" PARENT_SCOPE)
      return()
    endif()
  endif()
  file(SHA256 "${wheel}" found)
  if(NOT found STREQUAL KERNEL_LENS_SHA256)
    message(FATAL_ERROR "${wheel}: expected SHA-256 ${KERNEL_LENS_SHA256}, found ${found}. Delete the file, or set "
                        "SWS_TENSORRT_INCLUDE_DIR to the headers of a TensorRT SDK.")
  endif()
  file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${folder}" PATTERNS "kernel_lens/include/*")
  set(${result} "${folder}/kernel_lens/include/tensorrt" PARENT_SCOPE)
endfunction()

option(SWS_FETCH_TENSORRT_HEADERS "Fetch the TensorRT headers from PyPI where no SDK is found" ON)

find_path(SWS_TENSORRT_INCLUDE_DIR NvInferRuntime.h
  HINTS ENV TENSORRT_ROOT ENV TENSORRT_DIR ENV TRT_LIBPATH
  PATHS /usr/local/tensorrt /usr/local/TensorRT /opt/tensorrt /usr
  PATH_SUFFIXES include include/x86_64-linux-gnu include/aarch64-linux-gnu
  DOC "Folder of NvInferRuntime.h")

if(NOT SWS_TENSORRT_INCLUDE_DIR AND SWS_FETCH_TENSORRT_HEADERS)
  sws_fetch_tensorrt_headers(fetched)
  if(fetched)
    set(SWS_TENSORRT_INCLUDE_DIR "${fetched}" CACHE PATH "Folder of NvInferRuntime.h" FORCE)
  endif()
endif()

if(NOT EXISTS "${SWS_TENSORRT_INCLUDE_DIR}/NvInferRuntime.h")
  message(FATAL_ERROR "The TensorRT headers (NvInferRuntime.h) were not found. Install a TensorRT SDK and set "
                      "TENSORRT_ROOT, or pass -DSWS_TENSORRT_INCLUDE_DIR=FOLDER, or allow a download from PyPI "
                      "(kernel-lens==${KERNEL_LENS_VERSION}).${SWS_FETCH_FAILURE}")
endif()
