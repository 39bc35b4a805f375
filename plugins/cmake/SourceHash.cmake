# SWS_SOURCE_HASH: SHA-256 over the names and contents of all sources, as sws_export.engines.plugin_library computes it.
file(GLOB_RECURSE sources RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}" CONFIGURE_DEPENDS
  "${CMAKE_CURRENT_SOURCE_DIR}/*.h" "${CMAKE_CURRENT_SOURCE_DIR}/*.cpp" "${CMAKE_CURRENT_SOURCE_DIR}/*.cu"
  "${CMAKE_CURRENT_SOURCE_DIR}/*.map" "${CMAKE_CURRENT_SOURCE_DIR}/*.cmake"
  "${CMAKE_CURRENT_SOURCE_DIR}/CMakeLists.txt")
list(SORT sources)
set(lines "")
foreach(source IN LISTS sources)
  file(SHA256 "${CMAKE_CURRENT_SOURCE_DIR}/${source}" hash)
  string(APPEND lines "${source} ${hash}\n")
endforeach()
string(SHA256 SWS_SOURCE_HASH "${lines}")
string(SUBSTRING "${SWS_SOURCE_HASH}" 0 16 SWS_SOURCE_HASH)
