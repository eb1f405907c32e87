# gflowgr with its C++ kernels, for CPUs; docs/installation.md says how it is built for GPUs.
#   docker build -t gflowgr .      (--build-arg TORCH_INDEX=URL: where pip finds another build of torch)
#   mkdir runs; docker run --rm -v "$PWD/runs:/home/gflowgr/runs" gflowgr quickstart
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=
ARG EXTRAS=train,lora
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/gflowgr
ENV PATH=/opt/gflowgr/bin:$PATH
RUN pip install --no-cache-dir torch ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir ".[$EXTRAS]" \
    && python -c "from gflowgr.backends import cpp_missing as why; assert why() is None, why()"

FROM python:${PYTHON}-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/gflowgr /opt/gflowgr
ENV PATH=/opt/gflowgr/bin:$PATH
RUN useradd --create-home gflowgr
USER gflowgr
WORKDIR /home/gflowgr
ENTRYPOINT ["gflowgr"]
CMD ["info"]
