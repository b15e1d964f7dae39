package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"
)

// outcome is the line that `podclient token` prints. Tests read it from the pod's log.
type outcome struct {
	Started    time.Time         `json:"started"`
	Status     int               `json:"status"` // 0: no response, see Error
	Body       string            `json:"body,omitempty"`
	Headers    map[string]string `json:"headers,omitempty"`
	Error      string            `json:"error,omitempty"`
	DurationMS float64           `json:"duration_ms"`
}

// maxResponse is the largest number of bytes that ask reads of a response. Responses of the token endpoint are far
// smaller.
const maxResponse = 1 << 20

func token(args []string) int {
	started := time.Now()
	flags := flag.NewFlagSet("token", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	resource := flags.String("resource", "https://management.azure.com/", "")
	query := flags.String("query", "", "")
	whole := flags.String("url", "", "")
	exit := flags.Bool("exit", false, "")
	timeout := flags.Duration("timeout", 2*time.Minute, "")
	if err := flags.Parse(args); err != nil {
		fail(err.Error())
	}
	target := *whole
	if target == "" {
		target = "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + url.QueryEscape(*resource)
		if *query != "" {
			target += "&" + *query
		}
	}
	result := ask(target, *timeout)
	result.Started = started
	result.DurationMS = float64(time.Since(started).Microseconds()) / 1000
	_ = json.NewEncoder(os.Stdout).Encode(result)
	if !*exit {
		waitForSignal()
		return 0
	}
	if result.Status == http.StatusOK {
		return 0
	}
	return 1
}

// ask sends one request over one connection. It does not use the client of net/http, because that client retries in
// some cases and follows redirects.
func ask(target string, timeout time.Duration) (result outcome) {
	err := func() error {
		u, err := url.Parse(target)
		if err != nil {
			return err
		}
		address := u.Host
		if u.Port() == "" {
			address = net.JoinHostPort(u.Hostname(), "80")
		}
		conn, err := net.DialTimeout("tcp", address, timeout)
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
			return err
		}
		req, err := http.NewRequest(http.MethodGet, target, nil)
		if err != nil {
			return err
		}
		req.Header.Set("Metadata", "true")
		req.Header.Set("User-Agent", "podclient")
		req.Close = true
		if err := req.Write(conn); err != nil {
			return err
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		result.Status = resp.StatusCode
		result.Headers = map[string]string{}
		for name, values := range resp.Header {
			result.Headers[name] = values[0]
		}
		body, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse))
		result.Body = string(body)
		return err
	}()
	if err != nil {
		result.Error = err.Error()
	}
	return result
}
