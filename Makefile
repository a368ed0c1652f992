# make, make run, make test: `make help` lists the rest. Programs are built into build/DEVICE-PRECISION, and ./train_gpt
# and ./test_gpt are links to those built last. One file is one program: all
# else is in headers, but cuDNN's front end, which takes a minute to compile.

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
HOST_FLAGS := -march=x86-64-v3 -fopenmp -ffp-contract=fast -fno-math-errno -Wall -Wextra
BASE      := -std=c++20 $(HOST_FLAGS) -Wno-uninitialized -Wno-maybe-uninitialized -I. $(DEPS:%=-isystem %) -MMD -MP
CXXFLAGS  ?= -O3
BUILD     := build/$(DEVICE)-$(PRECISION)
COMPILE    = @mkdir -p $(@D) && echo "  build  $@" && $(CXX) $(BASE) -MF $@.d

# `mpicc -show`, of Open MPI and of MPICH, prints the compiler and its flags. They count if they build a program.
MPI_FLAGS := $(if $(filter auto,$(MPI)),$(shell mpicc -show 2>/dev/null | cut -d' ' -f2-))
MPI_FLAGS := $(MPI_FLAGS:-I%=-isystem %) $(if $(MPI_FLAGS),-DUSE_MPI)
MPI_LINE   = printf '\043include <mpi.h>\nint main() { return MPI_Init(0, 0); }'
MPI_BUILDS = $(shell $(MPI_LINE) | $(CXX) -x c - -x none -o /dev/null $(MPI_FLAGS) 2>/dev/null && echo yes)
MPI_FLAGS := $(if $(findstring -DUSE_MPI,$(MPI_FLAGS)),$(if $(MPI_BUILDS),$(MPI_FLAGS)))

# CUDA's libraries count if a line of them compiles and links: NCCL (NO_NCCL=1 leaves it out) and cuDNN (NO_CUDNN=1),
# whose C++ front end is a set of headers (CUDNN_FRONTEND=DIR). CUDA_DIRS: further directories with include/ and lib/.
CUDA      := $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
CUDA_PATHS := $(foreach dir,$(CUDA_DIRS) $(CUDA),-isystem $(dir)/include -L$(dir)/lib -L$(dir)/lib64)
FRONT_END := $(firstword $(CUDNN_FRONTEND) $(patsubst %/cudnn_frontend.h,%,$(wildcard $(DEPS:%=%/cudnn_frontend.h))) \
               $(wildcard build/venv-cuda/lib/python3*/site-packages/include))
compiles   = $(shell printf '\043$(1)' | $(CXX) -std=c++20 -x c++ - -x none -o /dev/null $(2) 2>/dev/null && echo yes)
ifeq ($(DEVICE),cuda)
HAS_NCCL  := $(if $(NO_NCCL),,$(call compiles,include <nccl.h>\nint main() { return ncclGetVersion(nullptr); },$(CUDA_PATHS) -lnccl))
HAS_CUDNN := $(if $(NO_CUDNN),,$(call compiles,include <cudnn.h>\n\043include <cudnn_frontend_version.h>\nstatic_assert(CUDNN_VERSION >= 91800);int main() {},$(FRONT_END:%=-isystem %) $(CUDA_PATHS)))
$(if $(HAS_NCCL),,$(info No NCCL: ranks exchange through host memory, or within one GPU.))
$(if $(HAS_CUDNN),,$(info No cuDNN or front end (scripts/setup.sh --cuda): our own attention, slower, takes its place.))
endif
CUDNN_OBJECT := build/cuda-cudnn_attention.o

# How a program is built for each device.
ON_HOST    := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-unknown-pragmas -DUSE_CUDA -Idev/tests/cuda_on_host
BUILD_cpu   = $(COMPILE) $(CXXFLAGS) $(PRECISION_$(PRECISION)) -x c++ $< -x none -o $@ $(MPI_FLAGS)
BUILD_cuda-on-host = $(COMPILE) $(ON_HOST) $(PRECISION_$(PRECISION)) -x c++ $< -x none -o $@ -lboost_context
BUILD_cuda  = @mkdir -p $(@D) && echo "  build  $@" && $(NVCC) -std=c++20 -O3 -x cu $(CUDA_ARCH) --expt-relaxed-constexpr \
              -DUSE_CUDA $(PRECISION_$(PRECISION)) $(addprefix -Xcompiler ,$(HOST_FLAGS)) -I. $(DEPS:%=-isystem %) $(CUDA_PATHS) \
              -MMD -MP -MF $@.d $< -o $@ -lcublasLt $(if $(HAS_NCCL),-DUSE_NCCL -lnccl) \
              $(if $(and $(HAS_CUDNN),$(filter bf16,$(PRECISION))),-DUSE_CUDNN -Xlinker $(CUDNN_OBJECT) -ldl) $(MPI_FLAGS)

$(CUDNN_OBJECT): llmc/kernels/cudnn_attention.cpp
	@mkdir -p $(@D) && echo "  build  $@" && $(CXX) -std=c++20 -O1 -Wall -Wextra -I. -MMD -MP -MF $@.d \
	    -DNV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING -DCUDNN_FRONTEND_SKIP_JSON_LIB $(FRONT_END:%=-isystem %) $(CUDA_PATHS) -c $< -o $@

UNIT_TESTS := $(filter-out %/cudnn_plans_test,$(patsubst dev/tests/%.cpp,build/tests/%,$(wildcard dev/tests/*_test.cpp)))
FUZZ_TESTS := $(patsubst dev/tests/%.cpp,build/tests/%,$(wildcard dev/tests/fuzz_*.cpp))
BENCHMARKS := $(patsubst dev/bench/%.cpp,build/bench/%,$(wildcard dev/bench/*.cpp))
SOURCES    := $(wildcard *.cu llmc/*.h llmc/*/*.h llmc/*/*/*.h llmc/*/*.cuh llmc/*/*.cpp dev/tests/*.cpp dev/tests/*/*.cpp dev/tests/*.h dev/tests/*/*.h dev/bench/*.cpp dev/bench/*.cu dev/bench/*.h)

.DEFAULT_GOAL := all
.PHONY: all run test bench tests cuda-build format check-format tidy clean help
.DELETE_ON_ERROR:

all: train_gpt test_gpt  ## build ./train_gpt and ./test_gpt (DEVICE=cpu|cuda, PRECISION=fp32|bf16|fp64, DEPS=DIR)

run:  ## set up, build, make a corpus of /usr/include, train `tiny` for a minute, sample text
	@scripts/setup.sh
	@$(MAKE) --no-print-directory train_gpt
	@scripts/run_demo.sh

test:  ## set up, build, run every test; the last line reads `N passed, N failed`
	@scripts/setup.sh --test
	@$(MAKE) --no-print-directory -j2 all tests
	@$(if $(NVCC),scripts/setup.sh --cuda && $(MAKE) --no-print-directory -j2 DEVICE=cuda cuda-build,echo "No nvcc: the CUDA build is not tested.")
	@scripts/run_tests.sh

bench:  ## set up (a current PyTorch, too) and build the benchmarks into build/bench
	@scripts/setup.sh --bench
	@$(MAKE) --no-print-directory train_gpt $(BENCHMARKS)

# What `make test` builds for GPUs, to see that it builds.
cuda-build: $(BUILD)/train_gpt $(BUILD)/test_gpt build/tests/kernel_cases_cuda-fp32 build/bench/gpu_kernels_cuda-bf16 $(if $(HAS_NCCL),build/tests/nccl_self_cuda) $(if $(HAS_CUDNN),build/tests/cudnn_plans_test)

tests: $(addprefix build/,cpu-bf16/train_gpt cpu-bf16/test_gpt cpu-fp64/test_gpt cuda-on-host-fp32/test_gpt cuda-on-host-fp32/train_gpt) \
       build/bench/gpu_kernels_cuda-on-host-fp32 \
       $(UNIT_TESTS) $(FUZZ_TESTS) build/tests/cuda_on_host_faults \
       $(addprefix build/tests/kernel_cases_,cpu-fp64 cpu-fp32 cpu-bf16 cuda-on-host-fp32 cuda-on-host-bf16) $(if $(MPI_FLAGS),$(addprefix build/tests/mpi_,check layouts check_on_host layouts_on_host))

train_gpt test_gpt: %: $(BUILD)/% FORCE
	@ln -sfn $< $@

build/tests/cudnn_plans_test: dev/tests/cudnn_plans_test.cpp $(CUDNN_OBJECT)
	$(COMPILE) -O1 -DPRECISION_BF16 $(CUDA_PATHS) -DCUDA_DRIVER_STUB='"$(CUDA)/lib64/stubs/libcuda.so"' $< $(CUDNN_OBJECT) -o $@ \
	    -lgtest -lgtest_main -lcudart -ldl -pthread

# Programs and the cases of all kernels, for each device and precision. They are built again when what they are built
# with changes.
BUILT_WITH = $(CXX) $(CXXFLAGS) $(MPI_FLAGS) $(if $(filter cuda,$(DEVICE)),$(CUDA_ARCH) $(if $(HAS_NCCL),NCCL) $(if $(HAS_CUDNN),cuDNN))
define programs
build/$(1)-$(2)/% build/tests/kernel_cases_$(1)-$(2) build/bench/gpu_kernels_$(1)-$(2): DEVICE := $(1)
build/$(1)-$(2)/% build/tests/kernel_cases_$(1)-$(2) build/bench/gpu_kernels_$(1)-$(2): PRECISION := $(2)
build/$(1)-$(2)/%: %.cu build/$(1)-$(2)/flags $$(if $$(HAS_CUDNN),$$(CUDNN_OBJECT)) ; $$(BUILD_$(1))
build/tests/kernel_cases_$(1)-$(2): dev/tests/kernel_cases.cpp $$(if $$(HAS_CUDNN),$$(CUDNN_OBJECT)) ; $$(BUILD_$(1))
build/bench/gpu_kernels_$(1)-$(2): dev/bench/gpu_kernels.cu $$(if $$(HAS_CUDNN),$$(CUDNN_OBJECT)) ; $$(BUILD_$(1))
build/$(1)-$(2)/flags: FORCE ; @mkdir -p $$(@D) && echo '$$(BUILT_WITH)' | cmp -s - $$@ || echo '$$(BUILT_WITH)' >$$@
endef
$(foreach precision,fp32 bf16 fp64,$(eval $(call programs,cpu,$(precision))))
$(foreach device,cuda-on-host cuda,$(foreach precision,fp32 bf16,$(eval $(call programs,$(device),$(precision)))))

# Tests of CUDA code, without a GPU.
build/tests/nccl_transport_on_host_test build/tests/nccl_self_test: ON_HOST := -Idev/tests/nccl_on_host -DUSE_NCCL $(ON_HOST)
build/tests/nccl_self_test: dev/tests/nccl_self_test.cpp
	$(COMPILE) $(ON_HOST) -DPRECISION_FP32 $< -o $@ -lboost_context -pthread
build/tests/nccl_self_cuda: PRECISION := fp32
build/tests/nccl_self_cuda: dev/tests/nccl_self_test.cpp ; $(BUILD_cuda)
build/tests/cuda_on_host_faults: dev/tests/cuda_on_host/faults.cpp
	$(COMPILE) $(ON_HOST) -DPRECISION_BF16 $< -o $@ -lboost_context
build/tests/%_on_host_test: dev/tests/%_on_host_test.cpp
	$(COMPILE) $(ON_HOST) -DPRECISION_FP32 $< -o $@ -lgtest -lgtest_main -lboost_context -pthread

build/tests/fuzz_%: dev/tests/fuzz_%.cpp
	$(COMPILE) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -DPRECISION_FP32 $< -o $@

build/tests/%_tsan_test: dev/tests/%_tsan_test.cpp
	$(COMPILE) -O1 -g -fsanitize=thread -DPRECISION_FP32 $< -o $@ -lgtest -lgtest_main -pthread

build/tests/%_fp64_test: dev/tests/%_fp64_test.cpp
	$(COMPILE) -O2 -DPRECISION_FP64 $< -o $@ -lgtest -lgtest_main -pthread

# Ranks as processes; also of the program for GPUs, on the host.
build/tests/mpi_check_on_host: ON_HOST := -Idev/tests/nccl_on_host $(ON_HOST)
build/tests/mpi_%_on_host: dev/tests/mpi_%.cpp
	$(COMPILE) $(ON_HOST) -DPRECISION_FP32 $< -o $@ -lboost_context $(MPI_FLAGS)

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
