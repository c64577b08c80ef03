"""The job script of the recipe in docs/scale.md, as dask-jobqueue generates it."""

from dask_jobqueue import SLURMCluster


def test_a_slurm_worker_has_one_thread_and_all_its_cores():
    cluster = SLURMCluster(
        cores=1,
        processes=1,
        job_cpu=4,
        memory="8GB",
        walltime="04:00:00",
        job_script_prologue=["export DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON__OMP_NUM_THREADS=4"],
        n_workers=0,
    )
    with cluster:
        script = cluster.job_script()
    assert "#SBATCH --cpus-per-task=4" in script
    assert "#SBATCH -t 04:00:00" in script
    assert "--nthreads 1" in script
    assert "OMP_NUM_THREADS=4" in script
