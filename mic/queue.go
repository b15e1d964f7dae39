package mic

import (
	"context"
	"time"

	"go.uber.org/zap"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// queue is a work queue of keys. One worker at a time reconciles a key. A key that is added during its reconcile, once
// or more often, is reconciled once more afterwards.
type queue struct {
	workqueue.TypedRateLimitingInterface[string]
	name    string
	workers int
	log     *zap.Logger
	// reconcile returns the delay until the next reconcile of the key; 0 means that only an event or an error requires
	// one.
	reconcile func(ctx context.Context, key string) (requeueAfter time.Duration, err error)
}

func newQueue(name string, workers int, log *zap.Logger, reconcile func(context.Context, string) (time.Duration, error)) *queue {
	limiter := workqueue.NewTypedItemExponentialFailureRateLimiter[string](100*time.Millisecond, 30*time.Second)
	return &queue{
		TypedRateLimitingInterface: workqueue.NewTypedRateLimitingQueueWithConfig(limiter, workqueue.TypedRateLimitingQueueConfig[string]{Name: name}),
		name:                       name, workers: workers, log: log, reconcile: reconcile,
	}
}

// run runs the workers until ctx ends, and returns when all workers have ended.
func (q *queue) run(ctx context.Context) {
	yes, no := true, false
	c, err := controller.NewTypedUnmanaged(q.name, controller.TypedOptions[string]{
		Reconciler:              q,
		MaxConcurrentReconciles: q.workers,
		SkipNameValidation:      &yes, // one process may run several Controllers, as tests do
		UsePriorityQueue:        &no,
		NewQueue: func(string, workqueue.TypedRateLimiter[string]) workqueue.TypedRateLimitingInterface[string] {
			return q.TypedRateLimitingInterface
		},
	})
	if err == nil {
		err = c.Start(ctx)
	}
	if err != nil {
		q.log.Error("the workers of a queue failed; MIC processes no further keys of this queue; restart MIC", zap.String("queue", q.name), zap.Error(err))
	}
}

// Reconcile implements reconcile.TypedReconciler. It logs the first of several consecutive failures of a key as a
// warning and the others at level debug: while the API server is not available, each key fails again and again.
func (q *queue) Reconcile(ctx context.Context, key string) (reconcile.Result, error) {
	requeueAfter, err := q.reconcile(ctx, key)
	if err == nil {
		q.Forget(key)
		return reconcile.Result{RequeueAfter: requeueAfter}, nil
	}
	if ctx.Err() != nil {
		return reconcile.Result{}, nil //nolint:nilerr // MIC stops, which is no failure
	}
	level := zap.DebugLevel
	if q.NumRequeues(key) == 0 {
		level = zap.WarnLevel
	}
	q.log.Log(level, "reconcile failed; MIC retries", zap.String("queue", q.name), zap.String("key", key), zap.Error(err))
	q.AddRateLimited(key)
	return reconcile.Result{}, nil
}
