# A CMake toolchain for zig, which brings headers and libraries of every target with it: no cross compiler, no sysroot.
# EDGEML_TARGET is zig's name of the target with the oldest glibc to run on, such as aarch64-linux-gnu.2.17; EDGEML_ZIG is the folder
# with the zig program and the one-line wrappers that wheels.py writes, because CMake wants an archiver that is one word.
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES EDGEML_TARGET EDGEML_ZIG)
set(CMAKE_SYSTEM_NAME Linux)
string(REGEX MATCH "^[a-z0-9_]+" CMAKE_SYSTEM_PROCESSOR "${EDGEML_TARGET}")
set(CMAKE_C_COMPILER "${EDGEML_ZIG}/cc")
set(CMAKE_C_COMPILER_TARGET "${EDGEML_TARGET}")
set(CMAKE_AR "${EDGEML_ZIG}/ar" CACHE FILEPATH "")
set(CMAKE_RANLIB "${EDGEML_ZIG}/ranlib" CACHE FILEPATH "")
# zig checks for undefined behaviour unless told not to; symbols go at link time, as the host's strip reads no other machine's files.
set(CMAKE_C_FLAGS_INIT "-fno-sanitize=undefined -g0")
set(CMAKE_EXE_LINKER_FLAGS_INIT "-s")
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-s")
set(CMAKE_MODULE_LINKER_FLAGS_INIT "-s")
