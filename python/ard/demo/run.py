"""`ard demo`: the whole method on real digits, from a teacher to scored students, in one folder.

    classifier -> teacher -> trajectories -> students with and without history -> GAN fine-tune -> samples -> report

The students of one seed start from the same weights (the teacher's) and see the same batches in the same order for the
same number of steps; they differ in the number of layers that read the history, and in nothing else. Zero layers is
plain step distillation. The one with most history is then fine-tuned against the real digits.
"""

from __future__ import annotations

from pathlib import Path

from ard.config.recipe import plain
from ard.data import digits
from ard.demo import pictures, report
from ard.demo.digit_scenes import DigitScenes
from ard.demo.scores import Judge, Subject, measure_costs, summarize
from ard.demo.settings import DemoConfig, load_config
from ard.demo.single_digits import SingleDigits
from ard.demo.students import Job, Stopwatch, make_trajectories, student_jobs
from ard.demo.workers import Workers, cores, threads
from ard.evaluation import digit_classifier
from ard.storage.files import write_json

__all__ = ["DemoConfig", "load_config", "run_demo", "summarize"]


def run_demo(
    out: Path,
    quick: bool = False,
    config: DemoConfig | None = None,
    family: str | None = None,
    scenes: bool = False,
) -> Path:
    """Runs every stage and returns the path of report.md.

    out: folder for report.json, report.md, grid.png, losses.png, the runs and the trajectory store; made if absent.
        A trajectory store left there by the same teacher and settings is reused, training starts anew.
    config: instead of ``load_config(quick, family=family, scenes=scenes)``.
    """
    config, out = config or load_config(quick, family=family, scenes=scenes), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with threads(1), Workers(min(config.demo.workers or cores(), config.demo.students)) as workers:
        return _run(out, quick, config, workers)


def _run(out: Path, quick: bool, config: DemoConfig, workers: Workers) -> Path:
    watch, data = Stopwatch(), digits.load()
    with watch.stage("classifier", 1) as advance:
        classifier, accuracy = digit_classifier.train_classifier(data, config.demo.classifier)
        advance()
    kind: type[DigitScenes | SingleDigits] = DigitScenes if config.demo.scenes else SingleDigits
    with watch.stage("data", 1) as advance:
        subject: Subject = kind(data, classifier, config)
        advance()
    with threads(config.demo.teacher_threads):  # nothing else is to be done meanwhile
        made = subject.make_teacher(out, watch)
    store = make_trajectories(made, out, watch, workers)
    jobs = student_jobs(made, store, subject.real(), config, out)
    students = workers.start(Job.run, jobs, size=lambda job: job.steps)
    judge = Judge(made, subject, config, watch, workers)  # the teacher's images behind them, for who is done first
    with watch.stage("students", sum(job.steps for job in jobs)) as advance:
        samplers = [sampler for trained in workers.finish(students, advance) for sampler in trained]
    teacher_scores, images = judge.scores(judge.teacher_images), judge.images(samplers)
    rows = [judge.row(sampler, own) for sampler, own in zip(samplers, images, strict=True)]
    costs = measure_costs(made, subject, samplers, config, watch)
    result = {
        "subject": subject.name,
        "quick": quick,
        "settings": {**plain(made.recipe), "demo": plain(config.demo)},
        "environment": report.environment(workers.count),
        "seconds_per_stage": watch.seconds,
        "classifier_held_out_accuracy": accuracy,
        "teacher": {"parameters": sum(p.numel() for p in made.teacher.parameters()), **teacher_scores},
        "real": subject.shares(subject.real_images) if config.demo.scenes else {},
        "students": rows,
        "summary": summarize(rows),
        "costs_per_image": costs,
    }
    write_json(out / "report.json", result)
    pictures.write_losses(out / "losses.png", made.log, {(s.name, s.seed): s.log for s in samplers})
    shown = {(sampler.name, sampler.seed): own for sampler, own in zip(samplers, images, strict=True)}
    pictures.write_grid(out / "grid.png", judge.teacher_images, shown, subject.captions, wide=bool(config.demo.scenes))
    return report.write_markdown(out / "report.md", result)
