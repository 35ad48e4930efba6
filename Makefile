# train_gpt_fp8: one source, built for NVIDIA GPUs by nvcc or for any CPU by g++.  `make help` lists what there is to make.
#
# What the build stands on is found by scripts/detect.sh, which leaves its findings in BUILD/config.mk; `make config` shows them.

# Wishes. Each may be given on the command line: make DEVICE=cuda GPU_ARCH="80 90a"
DEVICE ?= auto
GPU_ARCH ?=
MARCH ?= native
MPICC ?= mpicc
ifeq ($(origin CXX),default)
CXX := g++
endif

.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: all binary tests gpu-programs experiments config help clean setup test soak demo bench gpu-check

# These need no configuration; test, soak, demo and bench first install what is missing and then call make again.
UNCONFIGURED := help clean setup test soak demo bench gpu-check
ifneq ($(filter-out $(UNCONFIGURED),$(or $(MAKECMDGOALS),all)),)

quote = '$(subst ','\'',$(1))'
wish = $(1)=$(call quote,$($(1)))
WISHES := DEVICE CXX MPICC NO_MPI NO_NCCL GPU_ARCH MARCH EXTRA_CXXFLAGS EXTRA_LDFLAGS BUILD \
	$(foreach v,NVCC CUDA_HOME NCCL_HOME,$(if $($(v)),$(v)))
CONFIG := $(shell $(foreach v,$(WISHES),$(call wish,$(v))) scripts/detect.sh)
ifneq ($(.SHELLSTATUS),0)
$(error the build cannot be configured: scripts/detect.sh says why above)
endif
include $(CONFIG)

# One word to the people at the terminal: which device, and why; unless make runs silently or was called by another make.
ifeq ($(MAKELEVEL)$(findstring s,$(firstword -$(MAKEFLAGS)))$(filter config,$(MAKECMDGOALS)),0)
ifeq ($(DEVICE),cuda)
$(info DEVICE=cuda ($(WHY)), sm $(GPU_ARCH); MPI $(MPI); NCCL $(NCCL))
else
$(info DEVICE=cpu ($(WHY)); MPI $(MPI); oneDNN $(ONEDNN))
endif
endif

comma := ,
SANITIZERS := $(foreach s,$(subst $(comma), ,$(SANITIZE)),-fsanitize=$(s))
COMMON := -std=c++17 -O3 -I. $(JSON_CFLAGS) $(DEVICE_CFLAGS) $(filter -I% -D%,$(MPI_CFLAGS))
HOST := $(filter-out -I% -D%,$(MPI_CFLAGS)) $(SANITIZERS) $(if $(SANITIZERS),-O1 -g -fno-omit-frame-pointer) $(EXTRA_CXXFLAGS)
ifeq ($(DEVICE),cuda)
# No fused multiply-add: device and host give the same bits. Each flag for the host's compiler travels by itself.
COMPILE := $(NVCC) -x cu -ccbin $(firstword $(CXX)) $(COMMON) -DUSE_CUDA -fmad=false --expt-relaxed-constexpr -lineinfo $(GENCODE) \
	$(addprefix -Xcompiler=,-fopenmp -Wall -Wextra -ffp-contract=off $(HOST))
else
# Never -ffast-math: it deletes the checks for NaN. These flags are what lets g++ vectorise without it.
COMPILE := $(CXX) -x c++ $(COMMON) $(CPU_FLAGS) -Wall -Wextra -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp $(HOST)
endif
LINK := $(CXX) -fopenmp $(SANITIZERS)
LIBS := $(EXTRA_LDFLAGS) $(DEVICE_LIBS) $(MPI_LIBS) $(JSON_LIBS) -lm

# Test programs that are built once more, as simt_NAME: with the kernels' form for GPUs, run and watched on the CPU (test/simt.h)
SIMT := $(foreach name,simt device fp8_kernels gradient adam_fp8 attention,$(if $(wildcard test/simt_runtime.cpp),$(if $(wildcard test/$(name).cpp),$(name))))
TESTS := $(patsubst test/%.cpp,$(BUILD)/test/%,$(filter-out test/simt.cpp test/simt_runtime.cpp,$(wildcard test/*.cpp)))
# What a kernel does not read the compiler must not read ahead of it.
SIMT_FLAGS := -DSIMT -O1 -fno-tree-vectorize -fno-ssa-phiopt -fno-if-conversion -fno-if-conversion2 -fno-tree-pre -fno-threadsafe-statics -Wno-format-truncation -Wno-unused-function -fsanitize=thread
SIMT_TESTS := $(SIMT:%=$(BUILD)/test/simt_%)
EXPERIMENTS := $(patsubst scripts/%.cu,$(BUILD)/scripts/%,$(wildcard scripts/*.cu))

all: train_gpt_fp8 ## the trainer, ./train_gpt_fp8, for the device that was found or asked for

binary: $(BUILD)/train_gpt_fp8 ## the same in its build folder only, leaving ./train_gpt_fp8 as it is

tests: $(TESTS) $(if $(filter cpu,$(DEVICE)),$(SIMT_TESTS)) ## the unit tests' programs, without running them

# What scripts/gpu_check.sh runs
gpu-programs: binary experiments $(addprefix $(BUILD)/test/,$(shell sed -n "s/^programs='\(.*\)'/\1/p" scripts/gpu_check.sh))

# The programs that scripts/exp*.sh and the benches run
experiments: $(EXPERIMENTS)

config: ## show what was detected and the command lines that follow from it
	@$(foreach v,DEVICE WHY BUILD CXX NVCC CUDA_HOME GPU_ARCH MPI NCCL ONEDNN JSON COMPILE TEST_CFLAGS SIMT LINK LIBS,\
		printf '%s = %s\n' $(v) $(call quote,$($(v)));)

# ./train_gpt_fp8 is a second name of the last one built; a running one keeps its own file.
train_gpt_fp8: $(BUILD)/train_gpt_fp8 .FORCE
	@[ $< -ef $@ ] || ln -f $< $@ 2> /dev/null || cp --remove-destination $< $@

# A program goes before its object is compiled anew, so that what fails to compile leaves nothing stale to run.
$(BUILD)/%.o: %.cu $(BUILD)/flags
	@mkdir -p $(@D) && rm -f $(BUILD)/$*
	$(COMPILE) -MMD -MP -MF $(BUILD)/$*.d -c $< -o $@

$(BUILD)/%.o: %.cpp $(BUILD)/flags
	@mkdir -p $(@D) && rm -f $(BUILD)/$*
	$(COMPILE) $(TEST_CFLAGS) -MMD -MP -MF $(BUILD)/$*.d -c $< -o $@

$(BUILD)/test/simt_runtime.o: test/simt_runtime.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(COMPILE) -MMD -MP -MF $(BUILD)/test/simt_runtime.d -c $< -o $@

# Instrumented by the compiler; whom the instrumentation calls is simt_runtime.o, not libtsan
$(BUILD)/test/simt_%.o: test/%.cpp $(BUILD)/flags
	@mkdir -p $(@D) && rm -f $(BUILD)/test/simt_$*
	$(COMPILE) $(SIMT_FLAGS) -MMD -MP -MF $(BUILD)/test/simt_$*.d -c $< -o $@

$(BUILD)/train_gpt_fp8 $(EXPERIMENTS): $(BUILD)/%: $(BUILD)/%.o
	$(LINK) $< -o $@ $(LIBS)

$(TESTS): $(BUILD)/test/%: $(BUILD)/test/%.o
	$(LINK) $< -o $@ $(LIBS) -lcmocka

$(SIMT_TESTS): $(BUILD)/test/simt_%: $(BUILD)/test/simt_%.o $(BUILD)/test/simt_runtime.o
	$(LINK) $^ -o $@ $(LIBS) -lcmocka

# Everything compiled depends on this file, which changes when a command line does.
COMMANDS := $(COMPILE) / $(TEST_CFLAGS) / $(SIMT_FLAGS) / $(LINK) $(LIBS)
ifneq ($(file <$(BUILD)/flags),$(COMMANDS))
$(file >$(BUILD)/flags,$(COMMANDS))
endif
$(BUILD)/flags:
	@mkdir -p $(@D) && printf '%s\n' $(call quote,$(COMMANDS)) > $@

.PRECIOUS: $(BUILD)/%.o
.PHONY: .FORCE
.FORCE:

-include $(wildcard $(BUILD)/*.d $(BUILD)/test/*.d $(BUILD)/scripts/*.d)
endif

setup: ## install by apt-get what is missing, saying what each package is for
	@scripts/setup.sh

test: ## build everything, run every test on the CPU; ends with "N passed, N failed". ONLY="float8 build" picks some
	@scripts/test.sh $(ONLY)

soak: ## the same tests with their full counts: hours, before a release
	@SOAK=1 scripts/test.sh $(ONLY)

demo: ## watch one small GPT train in BF16 and in FP8 on real text (DATA=your.txt for your own)
	@scripts/demo.sh

bench: ## measure this machine: tokens a second, and where the time goes
	@scripts/setup.sh --demo --check || scripts/setup.sh --demo
	@$(MAKE) --no-print-directory all experiments
	@scripts/bench.sh

gpu-check: ## on a GPU: is everything right, and how fast is it? Results go to results/
	@scripts/setup.sh --check || scripts/setup.sh
	@$(MAKE) --no-print-directory DEVICE=cuda gpu-programs
	@BUILD=$(or $(BUILD),build/cuda) scripts/gpu_check.sh

clean: ## remove what was built (build/ and ./train_gpt_fp8); texts and runs stay
	rm -rf build train_gpt_fp8

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile \
	    | while IFS="$$(printf '\t')" read -r name why; do printf '  make %-9s %s\n' "$$name" "$$why"; done
	@printf '\nVariables, as in make DEVICE=cpu SANITIZE=address:\n'
	@printf '  %-29s %s\n' \
	    'DEVICE=auto|cuda|cpu' 'auto is cuda where nvcc and a GPU are there, else cpu' \
	    'GPU_ARCH="80 89 90a 100"' 'GPUs to build for (default: those here, else 90a), and, by PTX of the last, later ones' \
	    'CXX NVCC CUDA_HOME MPICC' 'the tools, where those on PATH are not the ones meant' \
	    'NCCL_HOME=DIR' 'the first place looked at for NCCL' \
	    'NO_MPI=1 NO_NCCL=1' 'build without' \
	    'MARCH=native' 'the CPU to build for' \
	    'EXTRA_CXXFLAGS EXTRA_LDFLAGS' 'added to the command lines' \
	    'SANITIZE=address,undefined' 'build with these sanitizers' \
	    'BUILD=DIR' 'where to build (default build/$$(DEVICE))'
