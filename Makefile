# make demo | demo-fractal | pretrained | test | venv | clean-demo | clean | help.   PYTHON=python3.12 chooses the interpreter of the environment.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# A step's target is a file that the step writes last, or a stamp touched after it: an interrupted step is done again,
# a finished one never. Prerequisites after | only set the order, so an edited config does not throw a model away.
CORPUS := data/demo/.written
SHARDS := processed/demo/meta.json
SHORT := runs/demo-short
RUN := runs/demo
BEGUN := $(SHORT)/.trained
TRAINED := $(RUN)/.trained
EVALUATED := $(RUN)/evaluation.json
SAMPLES := out/demo
GENERATED := $(SAMPLES)/generation.json
LISTS := data/demo-lists
LISTED := $(LISTS)/train.txt
FRACTAL := runs/fractal-demo
FRACTAL_TRAINED := $(FRACTAL)/.trained
FRACTAL_EVALUATED := $(FRACTAL)/evaluation.json
ROLLS := out/fractal-demo
FRACTAL_GENERATED := $(ROLLS)/.generated
PRE_MIDI := data/pretrained/.written
PRE_SHARDS := processed/pretrained/meta.json
PRE_SHORT := runs/pretrained-short
PRE_BEGUN := $(PRE_SHORT)/.trained
PRE_LONG := runs/pretrained-long
PRE_GROWN := $(PRE_LONG)/.trained
PRE := runs/pretrained
PRE_TRAINED := $(PRE)/.trained
PRE_EVALUATED := $(PRE)/evaluation.json
# Stray notes become rare below 1, and so do all others: the bias makes up for that (docs/log.md).
SURER := --temperature 0.95 --sparsity_bias -0.2

.PHONY: help venv demo demo-fractal pretrained test clean-demo clean-pretrained clean
.DELETE_ON_ERROR:

help:
	@echo "make demo          environment, demo music, a small model trained on it, new .mid and .png files"
	@echo "make demo-fractal  the same with piano rolls: new .mid, .png and .gif files"
	@echo "make pretrained    the model in pretrained/ again, as runs/pretrained; under four hours of a core"
	@echo "make test          ruff and the whole test suite"
	@echo "make venv          only the environment, in $(VENV)"
	@echo "make clean-demo    forget the demo's music, model and pieces"
	@echo "make clean-pretrained  forget what make pretrained made"
	@echo "make clean         both, the environment and the caches"

venv: $(INSTALLED)

$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt -e ".[dev,demo,plots]"
	@touch $@

demo: $(GENERATED) $(EVALUATED)
	@$(PY) -m meloformer.demo $(RUN) $(SAMPLES)

$(CORPUS): | $(INSTALLED)
	$(PY) -m meloformer.data.demo_corpus --output $(@D)
	@touch $@

$(SHARDS): | $(CORPUS)
	$(PY) preprocess_data.py --input $(dir $(CORPUS)) --output $(@D)

$(BEGUN): | $(SHARDS)
	$(PY) train.py --config configs/demo.yaml --data_dir $(dir $(SHARDS)) --output_dir $(SHORT) --resume auto
	@touch $@

$(TRAINED): | $(BEGUN)
	$(PY) train.py --config configs/demo_long.yaml --init_from $(SHORT) --data_dir $(dir $(SHARDS)) --output_dir $(RUN) \
	    --resume auto
	@touch $@

$(EVALUATED): | $(TRAINED)
	$(PY) evaluate.py --checkpoint $(RUN) --max_seq_len 4096

$(GENERATED): | $(TRAINED)
	$(PY) generate.py --checkpoint $(RUN) --output $(SAMPLES) --num_samples 4 --bars 8 --time_signature 4/4 \
	    --instruments drums,33,29,30 --plot

demo-fractal: $(FRACTAL_GENERATED) $(FRACTAL_EVALUATED)
	@$(PY) -m meloformer.fractal.demo $(FRACTAL) $(ROLLS)

$(LISTED): | $(CORPUS)
	$(PY) -m meloformer.fractal.lists --input $(dir $(CORPUS)) --output $(@D) --validation_fraction 0.1

$(FRACTAL_TRAINED): | $(LISTED)
	$(PY) train.py --config configs/fractal_demo.yaml --train_data $(LISTED) --val_data $(LISTS)/valid.txt \
	    --output_dir $(FRACTAL) --resume auto
	@touch $@

$(FRACTAL_EVALUATED): | $(FRACTAL_TRAINED)
	$(PY) evaluate.py --checkpoint $(FRACTAL)

# Killed between two of its lines, it would find the first one's files: they are removed, and written again.
$(FRACTAL_GENERATED): | $(FRACTAL_TRAINED)
	rm -rf $(ROLLS)
	$(PY) generate.py --checkpoint $(FRACTAL) --output $(ROLLS) --num_samples 4 --gif $(SURER)
	$(PY) generate.py --checkpoint $(FRACTAL) --output $(ROLLS) --num_samples 2 --gif $(SURER) \
	    --mode conditional --prompt data/demo/d_e1m1.mid
	$(PY) generate.py --checkpoint $(FRACTAL) --output $(ROLLS) --num_samples 2 --gif $(SURER) \
	    --mode inpainting --prompt data/demo/d_e1m1.mid --mask_start 64 --mask_end 128
	@touch $@

pretrained: $(PRE_EVALUATED)
	@echo "next: $(PY) -m meloformer.export --checkpoint $(PRE) --output mine --half"

$(PRE_MIDI): | $(INSTALLED)
	$(PY) -m pip install -c constraints.txt -e ".[bach]"
	$(PY) -m meloformer.data.demo_corpus --output $(@D)/freedoom
	$(PY) -m meloformer.data.demo_corpus --corpus bach --output $(@D)/bach
	@touch $@

$(PRE_SHARDS): | $(PRE_MIDI)
	$(PY) preprocess_data.py --input $(dir $(PRE_MIDI)) --output $(@D)

$(PRE_BEGUN): | $(PRE_SHARDS)
	$(PY) train.py --config configs/pretrained.yaml --data_dir $(dir $(PRE_SHARDS)) --output_dir $(PRE_SHORT) \
	    --resume auto
	@touch $@

$(PRE_GROWN): | $(PRE_BEGUN)
	$(PY) train.py --config configs/pretrained_long.yaml --init_from $(PRE_SHORT) --data_dir $(dir $(PRE_SHARDS)) \
	    --output_dir $(PRE_LONG) --resume auto
	@touch $@

$(PRE_TRAINED): | $(PRE_GROWN)
	$(PY) train.py --config configs/pretrained_whole.yaml --init_from $(PRE_LONG) --data_dir $(dir $(PRE_SHARDS)) \
	    --output_dir $(PRE) --resume auto
	@touch $@

$(PRE_EVALUATED): | $(PRE_TRAINED)
	$(PY) evaluate.py --checkpoint $(PRE) --max_seq_len 4096

test: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest

clean-pretrained:
	rm -rf data/pretrained processed/pretrained $(PRE_SHORT) $(PRE_LONG) $(PRE)

clean-demo:
	rm -rf data/demo $(LISTS) processed/demo $(SHORT) $(RUN) $(SAMPLES) $(FRACTAL) $(ROLLS)

clean: clean-demo clean-pretrained
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
