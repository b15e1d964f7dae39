package server

import (
	"net/http"
	"time"

	"go.uber.org/zap"

	"github.com/podidentity/podidentity/internal/text"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/credentials"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

// maxFieldBytes bounds each text from a client or from Azure in a log line. The encoder of the log escapes such texts.
const maxFieldBytes = 256

// logRequest writes the line of a request. The line of a token request is an audit record if the audit level includes
// it.
func (s *Server) logRequest(c *requestContext, took time.Duration) {
	isTokenRequest := c.req.Route == metadata.RouteToken || c.req.Route == metadata.RouteHostToken
	entry := s.logs.CheckRequest(isTokenRequest, c.status == http.StatusOK)
	if entry == nil {
		return
	}
	fields := append(c.fields, zap.String(telemetry.KeyRequestID, c.id), zap.String(telemetry.KeyRoute, string(c.req.Route)), zap.Int(telemetry.KeyStatus, c.status),
		zap.String(telemetry.KeyReason, string(c.reason)), zap.Stringer(telemetry.KeySource, c.caller.Address))
	if c.detail != "" {
		fields = append(fields, zap.String(telemetry.KeyDetail, c.detail))
	}
	if c.Pod != nil {
		fields = append(fields, zap.String(telemetry.KeyNamespace, c.Pod.Namespace), zap.String(telemetry.KeyPod, c.Pod.Name), zap.String(telemetry.KeyPodUID, string(c.Pod.UID)),
			zap.String(telemetry.KeyServiceAccount, credentials.ServiceAccountOf(c.Pod).Name))
	}
	if c.Verified != "" {
		fields = append(fields, zap.String(telemetry.KeyVerified, string(c.Verified)))
	}
	if c.caller.ContainerID != "" {
		fields = append(fields, zap.String(telemetry.KeyContainer, c.caller.ContainerID))
	}
	if c.Identity != nil {
		fields = append(fields, zap.String(telemetry.KeyIdentity, c.Identity.Key()), zap.String(telemetry.KeyClientID, abbreviateID(c.Identity.ClientID)))
	} else if requested := c.req.Selector.ClientID; requested != "" {
		fields = append(fields, zap.String(telemetry.KeyClientID, abbreviateID(requested)))
	}
	if c.req.Resource != "" {
		fields = append(fields, zap.String(telemetry.KeyResource, text.Truncate(c.req.Resource, maxFieldBytes)))
	}
	if c.Origin != "" {
		fields = append(fields, zap.String(telemetry.KeyCache, string(c.Origin)))
	}
	if c.TokenID != "" {
		fields = append(fields, zap.String(telemetry.KeyTokenID, c.TokenID))
	}
	if c.CorrelationID != "" {
		fields = append(fields, zap.String(telemetry.KeyCorrelationID, text.Truncate(c.CorrelationID, maxFieldBytes)))
	}
	c.fields = append(fields, zap.Float64(telemetry.KeyDuration, float64(took.Microseconds())/1000))
	entry.Write(c.fields...)
}

// abbreviateID keeps enough of an ID to recognize it and too little to use it. It also bounds the length of an ID that
// a client sent.
func abbreviateID(id string) string {
	if len(id) <= 8 {
		return id
	}
	return id[:4] + "…" + id[len(id)-4:]
}
