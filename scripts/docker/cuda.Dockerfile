# upcycle for NVIDIA GPUs. Never built by this project, which has no container engine to build it with.
#
#   docker build --file scripts/docker/cuda.Dockerfile --tag IMAGE .
#   docker run --gpus=all --volume=/shared:/shared IMAGE train --gin_file=...
#
# JAX's packages bring CUDA; the machine needs a driver for CUDA 12 and NVIDIA's container toolkit.
FROM python:3.12
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /upcycle
COPY setup.py pyproject.toml README.md LICENSE ./
COPY upcycle upcycle
COPY gin gin
COPY configs configs
RUN pip install --no-cache-dir '.[gpu,data]'
WORKDIR /
ENTRYPOINT ["upcycle"]
