# deconvd-server in a container: targets cpu and cuda. `make image` builds it. README.md, "In a container", has the
# lines that run it; CONTRIBUTING.md, "The images", says how it is tested, also without Docker.
#
# BASE_IMAGE can be any Linux image with glibc and Python >= 3.11 with its venv module, for example Debian with
# python3-venv; name it by digest (python@sha256:...) to build on the same one for ever. A CUDA base image is not
# necessary: wheels contain CUDA, and the container runtime provides the driver.
#
# The secret `pip` is a pip.conf, for a package index of one's own: --secret id=pip,src=pip.conf. It stays out of the image.
ARG BASE_IMAGE=docker.io/library/python:3.13.7-slim-bookworm

FROM ${BASE_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt pyproject.toml ./
COPY deploy/install.sh deploy/

FROM build AS packages-cpu
RUN --mount=type=secret,id=pip,target=/etc/pip.conf deploy/install.sh /opt/deconvd server packages

FROM packages-cpu AS build-cpu
COPY . .
RUN DESTDIR=/own deploy/install.sh /opt/deconvd server deconvd

FROM build AS packages-cuda
RUN --mount=type=secret,id=pip,target=/etc/pip.conf deploy/install.sh /opt/deconvd server,cuda13 packages

FROM packages-cuda AS build-cuda
COPY . .
RUN DESTDIR=/own deploy/install.sh /opt/deconvd server,cuda13 deconvd

FROM ${BASE_IMAGE} AS run
USER 10001:10001
# The root may be read-only, and the user may be another: all that is ever written goes to /tmp. The Unix socket there
# is for the health check, which needs no token on it.
ENV HOME=/tmp \
    PATH=/opt/deconvd/bin:$PATH \
    DECONVD_LISTEN="0.0.0.0:50051 unix:/tmp/deconvd.sock" \
    DECONVD_DIRECT_PORT=50052 \
    DECONVD_TARGET=unix:/tmp/deconvd.sock
EXPOSE 50051 50052
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 CMD ["deconvd-health"]
ENTRYPOINT ["deconvd-server"]
ARG BASE_IMAGE
ARG SOURCE=""
LABEL org.opencontainers.image.title="deconvd" \
    org.opencontainers.image.description="Chainer's deconvolution_2d and its gradients, run on a GPU host and called from anywhere" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.base.name="${BASE_IMAGE}"

# The packages come first: a new deconvd of the same packages is a small layer upon them.
FROM run AS cpu
ENV DECONVD_DEVICE=cpu
COPY --from=packages-cpu /opt/deconvd /opt/deconvd
COPY --from=build-cpu /own /
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"

FROM run AS cuda
ENV DECONVD_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /opt/deconvd /opt/deconvd
COPY --from=build-cuda /own /
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"
