# deconvd-server in a container: targets cpu and cuda. `make image` builds it.
#
#     docker run --publish 50051:50051 --publish 50052:50052 deconvd:cpu
#     docker run --publish 50051:50051 --publish 50052:50052 --gpus all deconvd:cuda
#
# BASE_IMAGE can be any Linux image with glibc, Python >= 3.11 with its venv module, and useradd, for example Debian
# with python3-venv. A CUDA base image is not necessary: wheels contain CUDA, and the container runtime provides the driver.
ARG BASE_IMAGE=docker.io/library/python:3.13.7-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY constraints.txt ./
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir \
        --only-binary :all: --constraint constraints.txt hatchling
RUN python3 -m venv /opt/deconvd
COPY . .
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheel .

FROM build AS build-cpu
RUN /opt/deconvd/bin/pip install --no-cache-dir --only-binary :all: --constraint constraints.txt \
        "$(echo /wheel/*.whl)[server]"

FROM ${BASE_IMAGE} AS run
RUN useradd --uid 10001 --create-home deconvd
USER 10001:10001
WORKDIR /home/deconvd
ENV PATH=/opt/deconvd/bin:$PATH \
    DECONVD_LISTEN=0.0.0.0:50051 \
    DECONVD_DIRECT_PORT=50052 \
    DECONVD_TARGET=127.0.0.1:50051
EXPOSE 50051 50052
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 \
    CMD ["deconvd", "status", "--timeout-s", "8"]
ENTRYPOINT ["deconvd-server"]

FROM run AS cpu
COPY --from=build-cpu /opt/deconvd /opt/deconvd
ENV DECONVD_DEVICE=cpu

FROM build AS build-cuda
RUN /opt/deconvd/bin/pip install --no-cache-dir --only-binary :all: --constraint constraints.txt \
        "$(echo /wheel/*.whl)[server,cuda13]"

FROM run AS cuda
COPY --from=build-cuda /opt/deconvd /opt/deconvd
ENV DECONVD_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
