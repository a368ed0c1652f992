# make, make run, make test: `make help` lists the rest. Programs are built into build/DEVICE-PRECISION, and ./train_gpt
# and ./test_gpt are links to those built last. One file is one program: all else is in headers.

# The device: cpu, or cuda for NVIDIA GPUs. cuda-on-host runs CUDA code without a GPU, slowly and under sanitizers, for
# tests (dev/tests/cuda_on_host).
DEVICE    ?= cpu
PRECISION ?= $(if $(filter cpu,$(DEVICE)),fp32,bf16)
# A directory of header-only libraries (CLI/, nlohmann/, xxhash.h), for machines where no package can be installed.
DEPS      ?=
CXX       ?= g++
NVCC      ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
# Code for the GPUs named here, and for later ones what the driver compiles at start.
CUDA_ARCH ?= -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90
# MPI, for ranks as processes: auto (use it if a program can be built with it) or no. Without it ranks are threads.
MPI       ?= auto

PRECISION_fp32 := -DPRECISION_FP32
PRECISION_bf16 := -DPRECISION_BF16
PRECISION_fp64 := -DPRECISION_FP64
ifeq ($(filter cpu cuda cuda-on-host,$(DEVICE)),)
$(error DEVICE=$(DEVICE) is not supported, use DEVICE=cpu or DEVICE=cuda)
endif
ifeq ($(DEVICE)-$(NVCC),cuda-)
$(error DEVICE=cuda needs nvcc of the CUDA toolkit; put it into PATH or give NVCC=/path/to/nvcc)
endif
ifeq ($(filter auto no,$(MPI)),)
$(error MPI=$(MPI) is not supported, use MPI=auto or MPI=no)
endif
ifndef PRECISION_$(PRECISION)
$(error PRECISION=$(PRECISION) is not supported, use fp32, bf16 or fp64)
endif
ifeq ($(PRECISION)-$(filter cpu,$(DEVICE)),fp64-)
$(error PRECISION=fp64 is for tests on the CPU, use fp32 or bf16)
endif

# Built for AVX2 and FMA; wider kernels carry a target attribute and are chosen when the program starts.
# -Wno-uninitialized -Wno-maybe-uninitialized: g++ 12 finds such variables in its own header of AVX-512 intrinsics.
BASE      := -std=c++20 -march=x86-64-v3 -fopenmp -ffp-contract=fast -fno-math-errno -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized -I. $(DEPS:%=-isystem %) -MMD -MP
CXXFLAGS  ?= -O3
BUILD     := build/$(DEVICE)-$(PRECISION)
COMPILE    = @mkdir -p $(@D) && echo "  build  $@" && $(CXX) $(BASE) -MF $@.d

# How a program is built for the device.
comma     := ,
HOST_FLAGS := -march=x86-64-v3 -fopenmp -ffp-contract=fast -fno-math-errno -Wall -Wextra
BUILD_cpu  = $(COMPILE) $(CXXFLAGS) $(PRECISION_$(PRECISION)) -x c++ $< -x none -o $@ $(MPI_FLAGS)
BUILD_cuda-on-host = $(COMPILE) $(ON_HOST) $(PRECISION_$(PRECISION)) -x c++ $< -x none -o $@ -lboost_context $(MPI_FLAGS)
BUILD_cuda = @mkdir -p $(@D) && echo "  build  $@" && $(NVCC) -std=c++20 -O3 -x cu $(CUDA_ARCH) --expt-relaxed-constexpr \
             -DUSE_CUDA $(PRECISION_$(PRECISION)) $(addprefix -Xcompiler ,$(HOST_FLAGS)) -I. $(DEPS:%=-isystem %) \
             -MMD -MP -MF $@.d $< -o $@ -lcublasLt
ON_HOST   := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-unknown-pragmas -DUSE_CUDA -Idev/tests/cuda_on_host

# `mpicc -show`, of Open MPI and of MPICH, prints the compiler and its flags. They count if they build a program.
MPI_FLAGS := $(if $(filter auto,$(MPI)),$(shell mpicc -show 2>/dev/null | cut -d' ' -f2-))
MPI_FLAGS := $(MPI_FLAGS:-I%=-isystem %) $(if $(MPI_FLAGS),-DUSE_MPI)
MPI_LINE   = printf '\043include <mpi.h>\nint main() { return MPI_Init(0, 0); }'
MPI_BUILDS = $(shell $(MPI_LINE) | $(CXX) -x c - -x none -o /dev/null $(MPI_FLAGS) 2>/dev/null && echo yes)
MPI_FLAGS := $(if $(findstring -DUSE_MPI,$(MPI_FLAGS)),$(if $(MPI_BUILDS),$(MPI_FLAGS)))

UNIT_TESTS := $(patsubst dev/tests/%.cpp,build/tests/%,$(wildcard dev/tests/*_test.cpp))
FUZZ_TESTS := $(patsubst dev/tests/%.cpp,build/tests/%,$(wildcard dev/tests/fuzz_*.cpp))
BENCHMARKS := $(patsubst dev/bench/%.cpp,build/bench/%,$(wildcard dev/bench/*.cpp))
SOURCES    := $(wildcard *.cu llmc/*.h llmc/*/*.h llmc/*/*/*.h llmc/*/*.cuh dev/tests/*.cpp dev/tests/*.h dev/bench/*.cpp dev/bench/*.h)

.PHONY: all run test bench tests format check-format tidy clean help
.DELETE_ON_ERROR:

all: train_gpt test_gpt  ## build ./train_gpt and ./test_gpt (PRECISION=fp32|bf16|fp64, DEPS=DIR)

run:  ## set up, build, make a corpus of /usr/include, train `tiny` for a minute, sample text
	@scripts/setup.sh
	@$(MAKE) --no-print-directory train_gpt
	@scripts/run_demo.sh

test:  ## set up, build, run every test; the last line reads `N passed, N failed`
	@scripts/setup.sh --test
	@$(MAKE) --no-print-directory PRECISION=bf16 build/$(DEVICE)-bf16/train_gpt build/$(DEVICE)-bf16/test_gpt
	@$(MAKE) --no-print-directory PRECISION=fp64 build/$(DEVICE)-fp64/test_gpt
	@$(MAKE) --no-print-directory -j2 all tests
	@scripts/run_tests.sh

bench:  ## set up (a current PyTorch, too) and build the benchmarks into build/bench
	@scripts/setup.sh --bench
	@$(MAKE) --no-print-directory train_gpt $(BENCHMARKS)

tests: $(UNIT_TESTS) $(FUZZ_TESTS) $(if $(MPI_FLAGS),build/tests/mpi_check build/tests/mpi_layouts)

train_gpt test_gpt: %: $(BUILD)/% FORCE
	@ln -sfn $< $@

# What the programs were built with; they are built again when it changes.
$(BUILD)/flags: FORCE
	@mkdir -p $(@D) && echo '$(CXX) $(CXXFLAGS) $(MPI_FLAGS)' | cmp -s - $@ || echo '$(CXX) $(CXXFLAGS) $(MPI_FLAGS)' >$@

$(BUILD)/%: %.cu $(BUILD)/flags
	$(BUILD_$(DEVICE))

# The cases of all kernels, built for each device and precision to be compared.
build/tests/kernel_cases_$(DEVICE)-$(PRECISION): dev/tests/kernel_cases.cpp
	$(BUILD_$(DEVICE))

build/tests/fuzz_%: dev/tests/fuzz_%.cpp
	$(COMPILE) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -DPRECISION_FP32 $< -o $@

build/tests/%_tsan_test: dev/tests/%_tsan_test.cpp
	$(COMPILE) -O1 -g -fsanitize=thread -DPRECISION_FP32 $< -o $@ -lgtest -lgtest_main -pthread

build/tests/%_fp64_test: dev/tests/%_fp64_test.cpp
	$(COMPILE) -O2 -DPRECISION_FP64 $< -o $@ -lgtest -lgtest_main -pthread

# The same test of CUDA code, without a GPU.
build/tests/%_on_host: dev/tests/%.cpp
	$(COMPILE) $(ON_HOST) -DPRECISION_FP32 $< -o $@ -lgtest -lgtest_main -lboost_context -pthread

build/tests/mpi_%: dev/tests/mpi_%.cpp
	$(COMPILE) -O2 -DPRECISION_FP32 $< -o $@ $(MPI_FLAGS)

build/tests/%: dev/tests/%.cpp
	$(COMPILE) -O2 -DPRECISION_FP32 $< -o $@ -lgtest -lgtest_main -pthread

build/bench/%: dev/bench/%.cpp
	$(COMPILE) $(CXXFLAGS) $(PRECISION_$(PRECISION)) $< -o $@

FORCE:
-include $(wildcard build/*/*.d)

format:  ## clang-format everything in place
	clang-format -i $(SOURCES)

check-format:  ## fail if `make format` would change something
	clang-format --dry-run --Werror $(SOURCES)

tidy:  ## clang-tidy with the list in .clang-tidy (apt-get install clang-tidy)
	clang-tidy --quiet train_gpt.cu -- -x c++ $(filter-out -M%,$(BASE)) -DPRECISION_FP32 \
	    -idirafter $(shell $(CXX) -print-file-name=include)

clean:  ## delete what was built; the Python environments, slow to make, stay
	rm -rf train_gpt test_gpt $(filter-out build/venv%,$(wildcard build/*))

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | expand -t 16
