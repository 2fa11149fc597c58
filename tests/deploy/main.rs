//! What `deploy/` holds: the chart and its rendering, the image, the daemon's pod.

mod chart;
mod cluster;
mod image;
mod meaning;
mod pod;

#[path = "../support"]
mod support {
    pub mod chart;
}
