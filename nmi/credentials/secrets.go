package credentials

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/token"
)

// secretTimeout bounds how long a request waits for the first look at a Secret.
const secretTimeout = 5 * time.Second

// maxSecretsPerPod is how many Secrets one pod may cause to be watched. It can name as many as there are identities bound to
// it, and each costs a connection's worth of API server.
const maxSecretsPerPod = 64

// Secrets watches the Secrets that identities in use name, each by itself and only as long as a pod lives that uses it.
//
// What it protects against: a Secret that was changed or removed and goes on bringing tokens, and rights on all Secrets
// of a namespace where one is meant. Their bytes are here and in the credentials made of them, and nowhere else.
type Secrets struct {
	ctx     context.Context // of the watches
	source  func(token.Ref) *cache.ListWatch
	read    func(context.Context, token.Ref) (*corev1.Secret, error)
	changed func(ref token.Ref, revision string) // a content is not current any more

	mu           sync.Mutex
	watched      map[token.Ref]*watchedSecret
	secretsOfPod map[string]map[token.Ref]struct{} // by UID of the pod
}

type watchedSecret struct {
	informer   cache.SharedIndexInformer
	stop       context.CancelFunc
	users      map[string]struct{} // UIDs of pods
	refused    chan struct{}       // closed when the API server has said no
	err        error               // why; this and the next are to be read once broken is closed
	retryAfter time.Time           // how long that is kept
}

// expired reports whether it is time to ask anew.
func (w *watchedSecret) expired() bool {
	select {
	case <-w.refused:
		return time.Now().After(w.retryAfter)
	default:
		return false
	}
}

func NewSecrets(ctx context.Context, source func(token.Ref) *cache.ListWatch, read func(context.Context, token.Ref) (*corev1.Secret, error), changed func(token.Ref, string)) *Secrets {
	return &Secrets{ctx: ctx, source: source, read: read, changed: changed, watched: map[token.Ref]*watchedSecret{}, secretsOfPod: map[string]map[token.Ref]struct{}{}}
}

// Secret implements [token.Secrets]: what a fetch reads that belongs to no pod in particular.
func (s *Secrets) Secret(ctx context.Context, ref token.Ref) (token.SecretContent, error) {
	s.mu.Lock()
	w := s.watched[ref]
	s.mu.Unlock()
	if w != nil && !w.expired() {
		return w.get(ctx, ref)
	}
	secret, err := s.read(ctx, ref)
	if err != nil {
		return token.SecretContent{}, secretReadError(ref, err)
	}
	return contentOf(secret), nil
}

// forPod returns the Secret for a pod that may use it, and watches it from then on until the pod is released.
func (s *Secrets) forPod(ctx context.Context, ref token.Ref, pod string) (token.SecretContent, error) {
	w, err := s.watch(ref, pod)
	if err != nil {
		return token.SecretContent{}, err
	}
	return w.get(ctx, ref)
}

func (s *Secrets) watch(ref token.Ref, pod string) (*watchedSecret, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	refs := s.secretsOfPod[pod]
	if _, has := refs[ref]; !has && len(refs) >= maxSecretsPerPod {
		return nil, token.ErrPodThrottled
	}
	w := s.watched[ref]
	if w == nil || w.expired() {
		next, err := s.startWatch(ref)
		if err != nil {
			return nil, err
		}
		if w != nil {
			next.users = w.users
		}
		w = next
		s.watched[ref] = w
	}
	if refs == nil {
		refs = map[token.Ref]struct{}{}
		s.secretsOfPod[pod] = refs
	}
	refs[ref] = struct{}{}
	w.users[pod] = struct{}{}
	return w, nil
}

// startWatch begins to watch. s.mu is refs.
func (s *Secrets) startWatch(ref token.Ref) (*watchedSecret, error) {
	w := &watchedSecret{users: map[string]struct{}{}, refused: make(chan struct{})}
	w.informer = cache.NewSharedIndexInformer(s.source(ref), &corev1.Secret{}, 0, cache.Indexers{})
	gone := func(o any) {
		if old, ok := cluster.LastState(o).(*cluster.Kept[token.SecretContent]); ok {
			s.changed(ref, old.Value.Revision)
		}
	}
	_, err := w.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		UpdateFunc: func(o, n any) {
			if o.(*cluster.Kept[token.SecretContent]).Value.Revision != n.(*cluster.Kept[token.SecretContent]).Value.Revision {
				gone(o)
			}
		},
		DeleteFunc: gone,
	})
	err = errors.Join(err,
		w.informer.SetTransform(func(o any) (any, error) {
			if secret, ok := o.(*corev1.Secret); ok {
				return cluster.Keep(secret, contentOf(secret)), nil
			}
			return o, nil
		}),
		w.informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
			if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
				s.stopRefused(w, err)
			}
		}))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(s.ctx)
	w.stop = cancel
	go w.informer.RunWithContext(ctx)
	return w, nil
}

// stopRefused ends a watch that the API server does not allow, so that it is asked anew soon: rights may be given meanwhile,
// and a watch that was refused would come back late.
func (s *Secrets) stopRefused(w *watchedSecret, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-w.refused:
	default:
		w.err, w.retryAfter = err, time.Now().Add(refusalTTL)
		close(w.refused)
		w.stop()
	}
}

// Pods returns the UIDs of the pods that Secrets are watched for.
func (s *Secrets) Pods() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.secretsOfPod))
}

// Release forgets a pod that is gone, and stops watching what only it used.
func (s *Secrets) Release(pod string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ref := range s.secretsOfPod[pod] {
		w := s.watched[ref]
		delete(w.users, pod)
		if len(w.users) > 0 {
			continue
		}
		w.stop()
		delete(s.watched, ref)
		for _, o := range w.informer.GetStore().List() {
			// Nobody will hear of a change from here on.
			go s.changed(ref, o.(*cluster.Kept[token.SecretContent]).Value.Revision)
		}
	}
	delete(s.secretsOfPod, pod)
}

// get waits for the first look and returns what is known.
func (w *watchedSecret) get(ctx context.Context, ref token.Ref) (token.SecretContent, error) {
	if !w.informer.HasSynced() {
		ctx, cancel := context.WithTimeout(ctx, secretTimeout)
		defer cancel()
		select {
		case <-w.informer.HasSyncedChecker().Done():
		case <-w.refused:
		case <-ctx.Done():
			return token.SecretContent{}, secretReadError(ref, ctx.Err())
		}
	}
	select {
	case <-w.refused:
		return token.SecretContent{}, secretReadError(ref, w.err)
	default:
	}
	o, ok, err := w.informer.GetStore().GetByKey(ref.String())
	if err != nil {
		return token.SecretContent{}, err
	}
	if !ok {
		return token.SecretContent{}, secretMissingError(ref)
	}
	return o.(*cluster.Kept[token.SecretContent]).Value, nil
}

func secretMissingError(ref token.Ref) error {
	return &token.Error{Class: token.Denied, Reason: identity.SecretMissing,
		Detail: fmt.Sprintf("Secret %s does not exist; create it, or correct spec.clientPassword of the AzureIdentity", ref)}
}

func secretReadError(ref token.Ref, err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return secretMissingError(ref)
	case apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err):
		return &token.Error{Class: token.Denied, Reason: identity.SecretUnreadable, Err: err,
			Detail: fmt.Sprintf("NMI may not read Secret %s; add it to nmi.secretNamespaces of the chart", ref)}
	}
	return &token.Error{Class: token.Unavailable, Err: err,
		Detail: fmt.Sprintf("Secret %s cannot be read at the moment: %v", ref, err)}
}

// revisionKey makes revisions say nothing about what they were made of.
var revisionKey = func() []byte {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails
	return key
}()

// contentOf takes from a Secret what credentials are made of, and names it by a hash that no other content has.
func contentOf(secret *corev1.Secret) token.SecretContent {
	sum := hmac.New(sha256.New, revisionKey)
	add := func(b []byte) {
		_ = binary.Write(sum, binary.BigEndian, uint64(len(b))) // a hash takes everything
		sum.Write(b)
	}
	for _, key := range slices.Sorted(maps.Keys(secret.Data)) {
		add([]byte(key))
		add(secret.Data[key])
	}
	return token.SecretContent{Data: secret.Data, Revision: base64.RawStdEncoding.EncodeToString(sum.Sum(nil)[:18])}
}
