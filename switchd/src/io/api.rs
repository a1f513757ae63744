//! The local socket: each request of [`SwitchRequest`] becomes one answer.

use super::control::{ControlCounters, Input, Reply};
use super::dataplane::DataPlane;
use crate::counters::Counters;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use violin_channel::local::{self, Sink};
use violin_common::api::switch::{Counter, SwitchReply, SwitchRequest};

/// What answers are made of.
#[derive(Debug, Clone)]
pub struct Api {
    /// The switch.
    pub inputs: mpsc::UnboundedSender<Input>,
    /// Who knows the traffic.
    pub dataplane: Arc<DataPlane>,
    /// What workers count.
    pub counters: Arc<Counters>,
    /// What the control side counts.
    pub control: Arc<ControlCounters>,
}

impl Api {
    async fn answer(&self, request: SwitchRequest) -> Reply {
        match request {
            SwitchRequest::Counters => {
                let mut all = self.counters.snapshot();
                all.extend(self.control.snapshot());
                all.push(Counter { name: "log.lines-lost".into(), value: violin_channel::log::lines_lost() });
                Ok(SwitchReply::Counters(all))
            }
            SwitchRequest::Traffic => Ok(SwitchReply::Traffic(self.dataplane.traffic())),
            SwitchRequest::PortConditions => Ok(SwitchReply::PortConditions(self.dataplane.conditions())),
            request => {
                let (sender, reply) = oneshot::channel();
                let ends = || "the switch is ending".to_owned();
                self.inputs.send(Input::Request(request, sender)).map_err(|_| ends())?;
                reply.await.map_err(|_| ends())?
            }
        }
    }

    /// Serves the socket for ever.
    pub async fn serve(self, listener: local::Listener) {
        local::serve(listener, move |request: SwitchRequest, sink: Sink<SwitchReply>| {
            let api = self.clone();
            async move {
                let reply = api.answer(request).await;
                let _ = sink.finish(reply).await;
            }
        })
        .await;
    }
}
