package azure

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/podidentity/podidentity/internal/text"
)

// reloadInterval is the default of Reloading.CheckInterval.
const reloadInterval = 10 * time.Second

// Reloading is a Client that follows its configuration. Running operations keep the configuration they started with;
// operations after a change use the new one. An invalid change is reported, and the previous Client stays in use.
type Reloading struct {
	// CheckInterval is the interval between checks of the configuration; 0 means 10 s. It must not be set after Run
	// started.
	CheckInterval time.Duration

	path    string
	getenv  func(string) string
	options Options
	changed func(Config, error)
	current atomic.Pointer[activeConfig]

	// What was reported last. Only NewReloading and then Run may access it.
	last    Config
	lastErr string
}

// activeConfig is the configuration in use, with its Client.
type activeConfig struct {
	cfg    Config
	client *Client // nil: there has been no usable configuration yet
	err    error   // why client is nil
}

// NewReloading reads the configuration like [LoadConfig] and calls changed with the result: the configuration, or the
// error that makes the configuration unusable. After each change of the result, Run calls changed with the new result.
func NewReloading(path string, getenv func(string) string, o Options, changed func(Config, error)) *Reloading {
	r := &Reloading{path: path, getenv: getenv, options: o, changed: changed}
	r.report(r.refresh())
	return r
}

// Run checks the configuration until ctx ends. It compares the content, so a file may be edited or replaced.
func (r *Reloading) Run(ctx context.Context) {
	ticker := time.NewTicker(positive(r.CheckInterval, reloadInterval))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		cfg, err := r.refresh()
		if cfg != r.last || message(err) != r.lastErr {
			r.report(cfg, err)
		}
	}
}

// refresh reads the configuration, and uses it if it is valid and has changed.
func (r *Reloading) refresh() (Config, error) {
	cfg, err := LoadConfig(r.path, r.getenv)
	now := r.current.Load()
	if err == nil && now != nil && now.client != nil && now.cfg == cfg {
		return cfg, nil
	}
	var client *Client
	if err == nil {
		client, err = New(cfg, r.options)
	}
	if err == nil || now == nil || now.client == nil {
		r.current.Store(&activeConfig{cfg, client, err})
	}
	return cfg, err
}

func (r *Reloading) report(cfg Config, err error) {
	r.last, r.lastErr = cfg, message(err)
	if r.changed != nil {
		r.changed(cfg, err)
	}
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// Get is [Client.Get]. While there is no usable configuration, it returns an error of class Unconfigured with the
// reason.
func (r *Reloading) Get(ctx context.Context, of Resource) (State, error) {
	c, err := r.client(of, "_get")
	if err != nil {
		return State{}, err
	}
	return c.Get(ctx, of)
}

// Begin is [Client.Begin].
func (r *Reloading) Begin(ctx context.Context, of Resource, basis State, add, remove []string) (*Operation, error) {
	c, err := r.client(of, "_update")
	if err != nil {
		return nil, err
	}
	return c.Begin(ctx, of, basis, add, remove)
}

// Resume is [Client.Resume].
func (r *Reloading) Resume(ctx context.Context, of Resource, token string) (*Operation, error) {
	c, err := r.client(of, "_poll")
	if err != nil {
		return nil, err
	}
	return c.Resume(ctx, of, token)
}

// OwnIdentities is [Config.OwnIdentities] of the configuration in use.
func (r *Reloading) OwnIdentities() []string { return r.current.Load().cfg.OwnIdentities() }

func (r *Reloading) client(of Resource, operation string) (*Client, error) {
	now := r.current.Load()
	if now.client == nil {
		return nil, &Error{Class: Unconfigured, Operation: of.Kind.String() + operation, Message: text.OneLine(now.err.Error(), maxMessage)}
	}
	return now.client, nil
}
