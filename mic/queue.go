package mic

import (
	"context"
	"time"

	"go.uber.org/zap"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// queue is keyed work: a key is worked on by one worker at a time, and however often it is added meanwhile, it is
// worked on once more afterwards.
type queue struct {
	workqueue.TypedRateLimitingInterface[string]
	name    string
	workers int
	log     *zap.Logger
	work    func(ctx context.Context, key string) (again time.Duration, err error)
}

func newQueue(name string, workers int, log *zap.Logger, work func(context.Context, string) (time.Duration, error)) *queue {
	limiter := workqueue.NewTypedItemExponentialFailureRateLimiter[string](100*time.Millisecond, 30*time.Second)
	return &queue{
		TypedRateLimitingInterface: workqueue.NewTypedRateLimitingQueueWithConfig(limiter, workqueue.TypedRateLimitingQueueConfig[string]{Name: name}),
		name:                       name, workers: workers, log: log, work: work,
	}
}

// run works until ctx ends, and returns when the workers have ended.
func (q *queue) run(ctx context.Context) {
	yes, no := true, false
	c, err := controller.NewTypedUnmanaged(q.name, controller.TypedOptions[string]{
		Reconciler:              q,
		MaxConcurrentReconciles: q.workers,
		SkipNameValidation:      &yes, // a process may lead more than once
		UsePriorityQueue:        &no,
		NewQueue: func(string, workqueue.TypedRateLimiter[string]) workqueue.TypedRateLimitingInterface[string] {
			return q.TypedRateLimitingInterface
		},
	})
	if err == nil {
		err = c.Start(ctx)
	}
	if err != nil {
		q.log.Error("working off a queue", zap.String("queue", q.name), zap.Error(err))
	}
}

// Reconcile implements reconcile.TypedReconciler. Failures are logged here, the first of a row at once and the others
// for those who look closely: while the API server is away each key fails again and again.
func (q *queue) Reconcile(ctx context.Context, key string) (reconcile.Result, error) {
	again, err := q.work(ctx, key)
	if err == nil {
		q.Forget(key)
		return reconcile.Result{RequeueAfter: again}, nil
	}
	if ctx.Err() != nil {
		return reconcile.Result{}, nil
	}
	level := zap.DebugLevel
	if q.NumRequeues(key) == 0 {
		level = zap.WarnLevel
	}
	q.log.Log(level, "failed; it is tried again", zap.String("queue", q.name), zap.String("key", key), zap.Error(err))
	q.AddRateLimited(key)
	return reconcile.Result{}, nil
}
