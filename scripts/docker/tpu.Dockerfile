# upcycle for TPUs, as of scripts/launch/gke.sh. Never built by this project, which has no container engine to build it with.
#
#   docker build --file scripts/docker/tpu.Dockerfile --tag IMAGE .
FROM python:3.12
WORKDIR /upcycle
COPY setup.py pyproject.toml README.md LICENSE ./
COPY upcycle upcycle
COPY gin gin
COPY configs configs
RUN pip install --no-cache-dir '.[tpu,data]'
WORKDIR /
ENTRYPOINT ["upcycle"]
