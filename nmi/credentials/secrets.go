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
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/nmi/token"
)

// secretTimeout bounds how long a request waits until the watch of a Secret has synced.
const secretTimeout = 5 * time.Second

// maxSecretsPerPod bounds how many Secrets NMI watches for one pod. Each identity that is bound to the pod can name
// another Secret, and each watch is an open request to the API server.
const maxSecretsPerPod = 64

// SecretSource reads Secrets from the API server.
type SecretSource interface {
	SecretListWatch(namespace, name string) *cache.ListWatch
	ReadSecret(ctx context.Context, namespace, name string) (*corev1.Secret, error)
}

// Secrets watches the Secrets of the identities in use. Each Secret has a watch of its own, which runs only while a pod
// uses the Secret.
//
// It protects against tokens from a Secret that was changed or deleted, and makes permissions for all Secrets of a
// namespace unnecessary. The content of a Secret is stored only in the informer of the Secret and in the credentials
// that [token.Entra] makes from it.
type Secrets struct {
	ctx      context.Context // of the watches
	source   SecretSource
	onChange func(ref token.Ref, revision string) // see Config.OnSecretChange

	mu           sync.Mutex
	watched      map[token.Ref]*watchedSecret
	secretsOfPod map[string]map[token.Ref]struct{} // by UID of the pod
}

// trimmedSecret is what the informer of a Secret keeps.
type trimmedSecret struct {
	kube.Meta
	content token.SecretContent
}

type watchedSecret struct {
	informer cache.SharedIndexInformer
	stop     context.CancelFunc
	podUIDs  map[string]struct{}

	refused    chan struct{} // is closed when the API server refuses the watch
	err        error         // the refusal; read err and retryAfter only after refused is closed
	retryAfter time.Time
}

// expired reports whether the watch was refused and may be started again.
func (w *watchedSecret) expired() bool {
	select {
	case <-w.refused:
		return time.Now().After(w.retryAfter)
	default:
		return false
	}
}

// NewSecrets returns Secrets whose watches end with ctx.
func NewSecrets(ctx context.Context, source SecretSource, onChange func(token.Ref, string)) *Secrets {
	return &Secrets{ctx: ctx, source: source, onChange: onChange, watched: map[token.Ref]*watchedSecret{}, secretsOfPod: map[string]map[token.Ref]struct{}{}}
}

// Secret implements [token.Secrets]. It returns the content from the watch of the Secret. If there is no watch, or
// refusalTTL has passed since the API server refused the watch, it reads the Secret from the API server. It does not
// start a watch: each watch is kept for certain pods, and this method does not know for which pods its caller fetches a
// token.
func (s *Secrets) Secret(ctx context.Context, ref token.Ref) (token.SecretContent, error) {
	s.mu.Lock()
	w := s.watched[ref]
	s.mu.Unlock()
	if w != nil && !w.expired() {
		return w.get(ctx, ref)
	}
	secret, err := s.source.ReadSecret(ctx, ref.Namespace, ref.Name)
	if err != nil {
		return token.SecretContent{}, secretReadError(ref, err)
	}
	return contentOf(secret), nil
}

// forPod returns the content of the Secret for a pod that may use it. It watches the Secret until this pod, and every
// other pod that uses the Secret, is released.
func (s *Secrets) forPod(ctx context.Context, ref token.Ref, uid string) (token.SecretContent, error) {
	w, err := s.watch(ref, uid) //nolint:contextcheck // the watch outlives the request
	if err != nil {
		return token.SecretContent{}, err
	}
	return w.get(ctx, ref)
}

// watch returns the watch of the Secret and records that the pod uses the Secret. It starts a watch if there is none,
// or if refusalTTL has passed since the API server refused the last one. It returns token.ErrPodThrottled if the pod
// already uses maxSecretsPerPod other Secrets.
func (s *Secrets) watch(ref token.Ref, uid string) (*watchedSecret, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	refs := s.secretsOfPod[uid]
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
			next.podUIDs = w.podUIDs
		}
		w = next
		s.watched[ref] = w
	}
	if refs == nil {
		refs = map[token.Ref]struct{}{}
		s.secretsOfPod[uid] = refs
	}
	refs[ref] = struct{}{}
	w.podUIDs[uid] = struct{}{}
	return w, nil
}

// startWatch starts the informer of a Secret. The caller must hold s.mu.
func (s *Secrets) startWatch(ref token.Ref) (*watchedSecret, error) {
	w := &watchedSecret{podUIDs: map[string]struct{}{}, refused: make(chan struct{})}
	w.informer = cache.NewSharedIndexInformer(s.source.SecretListWatch(ref.Namespace, ref.Name), &corev1.Secret{}, 0, cache.Indexers{})
	_, err := w.informer.AddEventHandler(kube.TypedHandler(func(old, current *trimmedSecret) {
		if old != nil && (current == nil || old.content.Revision != current.content.Revision) {
			s.onChange(ref, old.content.Revision)
		}
	}))
	err = errors.Join(err,
		w.informer.SetTransform(func(o any) (any, error) {
			if secret, ok := o.(*corev1.Secret); ok {
				return &trimmedSecret{kube.MetaOf(secret), contentOf(secret)}, nil
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

// stopRefused stops a watch that the API server refuses. A token request after refusalTTL then starts a new watch, so
// that a permission that an administrator grants takes effect soon. The informer itself would back off for too long.
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

// podUIDs returns the UIDs of the pods for which Secrets are watched.
func (s *Secrets) podUIDs() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.secretsOfPod))
}

// release records that the pod uses no Secret any more, and stops the watches of Secrets that no other pod uses.
func (s *Secrets) release(uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ref := range s.secretsOfPod[uid] {
		w := s.watched[ref]
		delete(w.podUIDs, uid)
		if len(w.podUIDs) > 0 {
			continue
		}
		w.stop()
		delete(s.watched, ref)
		for _, o := range w.informer.GetStore().List() {
			// From now on no watch reports a change of the Secret. So what was made from its revision must be dropped.
			go s.onChange(ref, o.(*trimmedSecret).content.Revision)
		}
	}
	delete(s.secretsOfPod, uid)
}

// get waits until the watch has synced, and returns the content of the Secret.
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
	return o.(*trimmedSecret).content, nil
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
			Detail: fmt.Sprintf("The API server does not let NMI read Secret %s: %v; if NMI lacks the permission, add the namespace or the Secret to the value nmi.secretNamespaces of the chart", ref, err)}
	}
	return &token.Error{Class: token.Unavailable, Err: err,
		Detail: fmt.Sprintf("NMI cannot read Secret %s at the moment: %v", ref, err)}
}

// revisionKey is the random key of the hash in a revision, so that a revision reveals nothing about the content.
var revisionKey = func() []byte {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails
	return key
}()

// contentOf returns the data of a Secret with its revision, a keyed hash that differs for each content.
func contentOf(secret *corev1.Secret) token.SecretContent {
	sum := hmac.New(sha256.New, revisionKey)
	add := func(b []byte) {
		_ = binary.Write(sum, binary.BigEndian, uint64(len(b))) // a hash never fails
		sum.Write(b)
	}
	for _, key := range slices.Sorted(maps.Keys(secret.Data)) {
		add([]byte(key))
		add(secret.Data[key])
	}
	return token.SecretContent{Data: secret.Data, Revision: base64.RawStdEncoding.EncodeToString(sum.Sum(nil)[:18])}
}
