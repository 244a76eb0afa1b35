# Every target sets up what it needs: host packages through apt, .venv, the tools root.

.DEFAULT_GOAL := help
.PHONY: help iso test bench check clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "More: ./build.py --help"

iso: ## Build dist/samepage-appliance-<version>-amd64.iso
	./build.py iso

test: ## Run every test: unit, golden, artifact, boot, faults
	./build.py test

bench: ## Measure the promises about speed and size
	./build.py bench

check: ## Validate the recipes, lint, check types, run the fast tests
	./build.py check >/dev/null
	./build.py test --lint -n auto tests/unit

clean: ## Remove what was built here
	./build.py clean
